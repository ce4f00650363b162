"""Of all cases of a test, so many that every two arguments meet in one of them.

Of four arguments with five values each, these are about thirty cases instead of 625. What only
three arguments together bring out may be missed; another seed draws other cases.
"""

import random
from collections.abc import Hashable, Mapping
from itertools import combinations
from typing import TypeVar

Case = TypeVar("Case", bound=Hashable)


def meetings(arguments: Mapping[str, Hashable]) -> set[Hashable]:
    """The pairs of arguments that a case shows, or the only one that it has."""
    own = sorted(arguments.items(), key=lambda argument: argument[0])
    return set(combinations(own, 2)) or set(own)


def cover(cases: Mapping[Case, Mapping[str, Hashable]], rng: random.Random) -> set[Case]:
    """Some of the cases, given with their arguments, that show all that these show."""
    shown = {case: meetings(arguments) for case, arguments in cases.items()}
    order = rng.sample(list(cases), len(cases))
    missing = set().union(*shown.values())
    chosen = set()
    while missing:
        best = max(order, key=lambda case: len(shown[case] & missing))
        chosen.add(best)
        missing -= shown[best]
    return chosen
