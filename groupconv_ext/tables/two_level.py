"""The counts of "Two-level group convolution", tables 1 to 4."""

from __future__ import annotations

from .counted import counted
from .figures import Figure, Row, Table

__all__ = ["tables"]

# N: (28-10 printed, exact), (34-2 printed, exact)
GROUPED = {
    2: (("18.25M", 18_251_994), ("43.55M", 43_548_584)),
    4: (("9.14M", 9_138_394), ("22.31M", 22_306_728)),
    8: (("4.58M", 4_581_594), ("11.69M", 11_685_800)),
    16: (("2.30M", 2_303_194), ("6.38M", 6_375_336)),
}
TWO_LEVEL = {
    2: (("18.35M", 18_347_674), ("43.71M", 43_710_888)),
    4: (("9.25M", 9_254_234), ("22.50M", 22_503_080)),
    8: (("4.74M", 4_737_754), ("11.95M", 11_950_248)),
    16: (("2.54M", 2_539_994), ("6.78M", 6_775_976)),
}
NETWORKS = (("WideResNet-28-10", "wide_resnet28", 32), ("WideResNet-34-2", "wide_resnet34", 224))
COLUMNS = ("parameters",)


def tables() -> list[Table]:
    """Tables 1 to 4."""
    return [_standard_and_two_level(), _widths(), _kinds(), _mobilenet()]


def _row(
    title: str, model: str, size: int, convolution: str, groups: int, printed: str, exact: int
) -> Row:
    found = counted(model, size, convolution=convolution, groups=groups)
    return Row(title, [Figure(found.parameters, printed, exact)])


def _standard_and_two_level() -> Table:
    rows = []
    for network, (title, model, size) in enumerate(NETWORKS):
        printed, exact = (("36.48M", 36_479_194), ("86.03M", 86_032_296))[network]
        rows.append(_row(f"{title} SC", model, size, "sc", 1, printed, exact))
        for groups in GROUPED:
            for name, convolution, figures in (
                ("GC", "gc", GROUPED),
                ("GC-2L", "gc2l", TWO_LEVEL),
            ):
                line = f"{title} {name}, N={groups}"
                figure = figures[groups][network]
                rows.append(_row(line, model, size, convolution, groups, *figure))
    return Table(
        "GC-2L, table 1: WideResNet",
        "All parameters; 10 classes in WideResNet-28-10, 1000 in -34-2.",
        COLUMNS,
        rows,
        ["The paper heads this column 'parameters per processor'; its figures are totals."],
    )


def _widths() -> Table:
    rows = []
    for width, figures in {
        40: ((1, "583.1M", 583_060_954), (2, "292.0M", 291_961_594), (4, "146.3M", 146_301_434)),
        60: (
            (1, "1311.7M", 1_311_736_794),
            (2, "656.5M", 656_514_874),
            (4, "328.7M", 328_738_234),
        ),
        80: (
            (1, "2331.8M", 2_331_843_034),
            (2, "1166.8M", 1_166_783_354),
            (4, "584.0M", 584_032_634),
        ),
    }.items():
        for groups, printed, exact in figures:
            convolution = "sc" if groups == 1 else "gc2l"
            found = counted(
                "wide_resnet28", 32, width=width, convolution=convolution, groups=groups
            )
            rows.append(Row(f"w={width}, N={groups}", [Figure(found.parameters, printed, exact)]))
    return Table("GC-2L, table 2: WideResNet-28-w", "All parameters, 10 classes.", COLUMNS, rows)


def _kinds() -> Table:
    rows = []
    for network, (title, model, size) in enumerate(NETWORKS):
        for groups in GROUPED:
            for name, convolution in (
                ("GC", "gc"),
                ("Shuffle", "shuffle"),
                ("FLGC", "flgc"),
                ("GC-2L", "gc2l"),
            ):
                figures = TWO_LEVEL if convolution == "gc2l" else GROUPED
                line = f"{title} {name}, N={groups}"
                figure = figures[groups][network]
                rows.append(_row(line, model, size, convolution, groups, *figure))
    return Table(
        "GC-2L, table 3: kinds of convolution in WideResNet",
        "All parameters, as in table 1; FLGC's by its partition, groups as even as can be.",
        COLUMNS,
        rows,
    )


def _mobilenet() -> Table:
    rows = [_row("SC", "mobilenet_v2", 224, "sc", 1, "3.50M", 3_504_872)]
    for groups, grouped, two_level in (
        (2, ("2.44M", 2_442_536), ("2.47M", 2_468_072)),
        (4, ("1.91M", 1_911_368), ("1.95M", 1_954_120)),
        (8, ("1.65M", 1_645_784), ("1.72M", 1_722_968)),
    ):
        for name, convolution in (("GC", "gc"), ("Shuffle", "shuffle"), ("FLGC", "flgc")):
            line = f"{name}, N={groups}"
            rows.append(_row(line, "mobilenet_v2", 224, convolution, groups, *grouped))
        rows.append(_row(f"GC-2L, N={groups}", "mobilenet_v2", 224, "gc2l", groups, *two_level))
    return Table(
        "GC-2L, table 4: MobileNetV2",
        "All parameters, 1000 classes. In GC-2L the 1×1 to 1280 channels is a group convolution.",
        COLUMNS,
        rows,
    )
