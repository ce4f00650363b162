"""What `--pairs` leaves out no two arguments need."""

import random
from itertools import combinations, product

import pytest
from pairs import cover

ARGUMENTS = {"isa": "abcde", "dtype": "fgh", "layout": "ij", "problem": "klmnopq"}


def cases() -> dict[int, dict[str, str]]:
    values = product(*ARGUMENTS.values())
    every = (dict(zip(ARGUMENTS, chosen, strict=True)) for chosen in values)
    # Not all combinations are tested, and what is tested only with others has to stay.
    return dict(enumerate(c for c in every if c["isa"] != "e" or c["dtype"] == "f"))


@pytest.mark.parametrize("seed", range(3))
def test_every_two_arguments_meet(seed: int) -> None:
    every = cases()
    chosen = cover(every, random.Random(seed))
    for one, other in combinations(ARGUMENTS, 2):
        meetings = {(case[one], case[other]) for case in every.values()}
        assert {(every[n][one], every[n][other]) for n in chosen} == meetings
    assert 35 <= len(chosen) <= 50 < len(every) // 3


def test_a_seed_draws_its_own() -> None:
    every = cases()
    drawn = [cover(every, random.Random(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_of_two_arguments_nothing_is_left_out() -> None:
    every = {n: {"isa": "abc"[n % 3], "layout": "ij"[n // 3]} for n in range(6)}
    assert cover(every, random.Random(0)) == set(every)
    assert cover({7: {"isa": "a"}, 8: {"isa": "b"}}, random.Random(0)) == {7, 8}
