"""The papers' tables: every figure counted anew, and what happens where one differs."""

import pytest

from groupconv_ext import cli, tables
from groupconv_ext.tables import Figure, Row, Table
from groupconv_ext.tables.dgconv import _gates


@pytest.mark.parametrize("paper", tables.PAPERS)
def test_every_figure_is_reproduced_or_explained(paper: str) -> None:
    found = tables.PAPERS[paper]()
    assert [line for table in found for line in table.unexplained] == []
    assert all(table.rows for table in found)
    for table in found:
        text = table.text()
        assert "WRONG" not in text
        assert table.title in text
        assert table.convention in text


def test_a_figure_agrees_where_it_rounds_to_the_printed_one() -> None:
    assert Figure(5_351_808, "5.35M").agrees
    assert Figure(5_345_000, "5.35M").agrees
    assert not Figure(5_344_999, "5.35M").agrees
    assert not Figure(5_355_001, "5.35M").agrees
    assert Figure(77_674, "0.078", unit=1e6).agrees
    assert Figure(3_200, "≈3000").agrees
    assert not Figure(3_301, "≈3000").agrees
    assert Figure(1.94, "2×").agrees
    assert Figure(12).agrees


def test_a_difference_needs_an_explanation() -> None:
    assert Figure(122, "124").unexplained == "counted 122; the paper prints 124"
    assert Figure(122, "124", exact=122, because="a reason").unexplained == ""


def test_an_explanation_holds_for_one_figure_only() -> None:
    assert "one exact figure" in Figure(122, "124", because="a reason").unexplained
    moved = Figure(121, "124", exact=122, because="a reason")
    assert moved.unexplained == "counted 121; the structure has 122"
    assert "needs no explanation" in Figure(124, "124", exact=124, because="a reason").unexplained


def test_what_is_exact_may_not_round() -> None:
    assert Figure(5_351_809, "5.35M", 5_351_808).unexplained


def test_a_printed_figure_is_a_number() -> None:
    with pytest.raises(ValueError, match=r"'five'; expected a number"):
        _ = Figure(5, "five").agrees


def test_text_numbers_its_notes() -> None:
    rows = [
        Row("a", [Figure(2, "2"), Figure(122, "124", 122, "a reason")]),
        Row("b", [None, Figure(122, "124", 122, "a reason")]),
        Row("c", [Figure(3), Figure(7, "8")]),
    ]
    table = Table("title", "convention", ("x", "y"), rows, ["remark"])
    lines = table.text().splitlines()
    assert lines[0] == "title"
    assert lines[5].split() == ["a", "2", "2", "=", "124", "122", "[1]"]
    assert lines[6].split() == ["b", "124", "122", "[1]"]
    assert lines[7].split() == ["c", "–", "3", "8", "7", "WRONG"]
    assert lines[8:] == ["remark", "[1] a reason"]
    assert table.unexplained == ["title, c, y: counted 7; the paper prints 8"]


def test_gates_for_a_number_of_groups() -> None:
    assert _gates(32)[128] == (0, 0, 0, 0, 0, 1, 1)
    assert _gates(64)[256] == (0, 0, 0, 0, 0, 0, 1, 1)


def wrong() -> list[Table]:
    return [Table("title", "convention", ("x",), [Row("a", [Figure(1, "2")])])]


def right() -> list[Table]:
    return [Table("title", "convention", ("x",), [Row("a", [Figure(2, "2")])])]


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 1), (["right"], 0), (["wrong"], 1), (["right", "wrong"], 1)]
)
def test_command_fails_where_a_difference_is_unexplained(
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables, "PAPERS", {"right": right, "wrong": wrong})
    assert cli.main(["tables", *arguments]) == status
    out, err = capsys.readouterr()
    assert ("unexplained: title, a, x: counted 1; the paper prints 2" in err) == (status == 1)
    assert ("= agrees" in out) == (status == 0)


def test_command_names_the_nearest_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tables", "igvc1"]) == 2
    assert "no paper 'igvc1'; did you mean 'igcv1'?" in capsys.readouterr().err
