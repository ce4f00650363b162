"""Names that somebody typed: refused with the nearest one that exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["check_known"]


def check_known(what: str, name: object, known: Iterable[str], remark: str = "") -> None:
    """Refuse a ``name`` that is not ``known``.

    Args:
        what: What it is the name of, for the error.
        name: What was given.
        known: What may be given.
        remark: Where to read more, for the end of the error.
    """
    names = sorted(known)
    if name in names:
        return
    nearest = get_close_matches(str(name), names, n=1, cutoff=0.5)
    guess = f"; did you mean {nearest[0]!r}?" if nearest else f"; expected one of {names}"
    raise ValueError(f"there is no {what} {name!r}{guess}{remark}")
