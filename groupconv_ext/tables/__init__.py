"""Every count that the five papers print, beside what this library counts.

``groupconv tables`` prints them; one file a paper.
"""

from __future__ import annotations

from collections.abc import Callable

from . import dgconv, flgc, igcv1, igcv2_igcv3, two_level
from .figures import Figure, Row, Table

__all__ = ["PAPERS", "Figure", "Row", "Table"]

PAPERS: dict[str, Callable[[], list[Table]]] = {
    "flgc": flgc.tables,
    "two_level": two_level.tables,
    "igcv1": igcv1.tables,
    "igcv2_igcv3": igcv2_igcv3.tables,
    "dgconv": dgconv.tables,
}
