"""The counts of "Interleaved group convolutions", tables 1, 3, 6 and 7."""

from __future__ import annotations

from typing import Any

from ..nn import InterleavedConv2d
from .counted import counted, without_norms
from .figures import Figure, Row, Table

__all__ = ["tables"]


def tables() -> list[Table]:
    """Tables 1, 3, 6 and 7."""
    return [_widths(), *_cifar(), _imagenet(), _best()]


# (L, M, parameters, width), as printed
BLOCKS = {
    "(i)": (
        (1, 23, "4784", "23"),
        (2, 16, "4672", "32"),
        (3, 13, "4680", "39"),
        (5, 10, "4750", "50"),
        (6, 9, "4698", "54"),
        (12, 6, "4752", "72"),
        (28, 3, "4620", "84"),
        (40, 2, "4640", "80"),
        (64, 1, "4672", "64"),
    ),
    "(ii)": (
        (1, 44, "17468", "44"),
        (2, 31, "17422", "63"),
        (4, 22, "17776", "88"),
        (12, 12, "17280", "144"),
        (14, 11, "17402", "154"),
        (23, 8, "17480", "184"),
        (28, 7, "17836", "196"),
        (41, 5, "17630", "205"),
        (64, 3, "17472", "192"),
        (85, 2, "17510", "170"),
        (128, 1, "17536", "128"),
    ),
}


def _widths() -> Table:
    rows = []
    for part, blocks in BLOCKS.items():
        for primary, secondary, parameters, printed_width in blocks:
            width = primary * secondary
            layer = InterleavedConv2d(
                width, width, 3, bias=False, primary_groups=primary, device="meta"
            )
            ours = sum(parameter.numel() for parameter in layer.parameters())
            by_formula = primary * secondary**2 * 9 + secondary * primary**2  # eq. 7
            because = "2 · 31 is 62" if printed_width == "63" else ""
            figures = [
                Figure(ours, parameters, by_formula),
                Figure(layer.out_channels, printed_width, width, because),
            ]
            rows.append(Row(f"{part} L={primary}, M={secondary}", figures))
    return Table(
        "IGC, table 1: widths of a block with about as many parameters",
        "The weights of one block with a 3×3.",
        ("parameters", "width"),
        rows,
    )


NETWORKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RegConv-W16", "regconv", {"width": 16}),
    ("RegConv-W18", "regconv", {"width": 18}),
    ("IGC-L4M8", "igc_l4m8", {}),
    ("IGC-L24M2", "igc_l24m2", {}),
)
# depth: parameters (M), then multiply-adds (10⁸), in the order of NETWORKS
DEPTHS = {
    8: (("0.075", "0.095", "0.078", "0.047"), ("0.122", "0.154", "0.131", "0.099")),
    20: (("0.27", "0.34", "0.27", "0.15"), ("0.406", "0.513", "0.424", "0.288")),
    38: (("0.56", "0.71", "0.57", "0.31"), ("0.830", "1.05", "0.862", "0.571")),
    62: (("0.95", "1.20", "0.96", "0.52"), ("1.40", "1.77", "1.45", "0.948")),
    98: (("1.53", "1.93", "1.56", "0.83"), ("2.25", "2.84", "2.32", "1.51")),
}
EXACT = {
    "IGC-L4M8": {8: 77_674, 20: 274_794, 38: 570_474, 62: 964_714, 98: 1_556_074},
    "IGC-L24M2": {8: 47_002, 20: 151_834, 38: 309_082, 62: 518_746, 98: 833_242},
}
EXACT_WORK = {"IGC-L4M8": 42_370_304, "IGC-L24M2": 28_755_840}  # of 20 layers


def _cifar() -> list[Table]:
    parameters, work = [], []
    for depth, printed in DEPTHS.items():
        found = [without_norms(counted(m, 32, depth=depth, **o)) for _, m, o in NETWORKS]
        exact = [EXACT.get(name, {}).get(depth) for name, *_ in NETWORKS]
        exact_work = [EXACT_WORK.get(name) if depth == 20 else None for name, *_ in NETWORKS]
        parameters.append(
            Row(
                f"D={depth}",
                [
                    Figure(*figure, unit=1e6)
                    for figure in zip((f.parameters for f in found), printed[0], exact, strict=True)
                ],
            )
        )
        work.append(
            Row(
                f"D={depth}",
                [
                    Figure(*figure, unit=1e8)
                    for figure in zip(
                        (f.multiply_adds for f in found), printed[1], exact_work, strict=True
                    )
                ],
            )
        )
    columns = [name for name, *_ in NETWORKS]
    convention = "Convolutions and classifier of 10 classes, at 32²; in "
    return [
        Table("IGC, table 3: #params on CIFAR", convention + "millions.", columns, parameters),
        Table("IGC, table 3: FLOPs on CIFAR", convention + "10⁸.", columns, work),
    ]


def _imagenet() -> Table:
    mixed = {
        "ResNet (C=64)": "fits no convention; without the classifier it is 11.167M",
        "ResNet (C=69)": "fits no convention: 11.333M with a wider network than ResNet (C=64)",
        "IGC-L4M32+Ident.": "without the classifier it is 11.207M",
        "IGC-L16M16+Ident.": "fits no convention; without the classifier it is 11.441M",
    }
    rows = []
    for name, model, options, parameters, multiply_adds, exact, work in (
        ("ResNet (C=64)", "resnet18", {}, "11.151", "1.8", 11_679_912, 1_814_073_344),
        ("ResNet (C=69)", "resnet18", {"width": 69}, "11.333", "2.1", 13_532_107, 2_098_611_264),
        ("IGC-L4M32+Ident.", "igc_resnet18_l4m32", {}, "11.205", "1.9", 12_232_040, 1_944_641_536),
        (
            "IGC-L16M16+Ident.",
            "igc_resnet18_l16m16",
            {},
            "11.329",
            "2.2",
            13_489_896,
            2_265_989_120,
        ),
        ("IGC-L100M2+Ident.", "igc_resnet18_l100m2", {}, "8.61", "1.3", 8_607_700, 1_264_780_800),
    ):
        found = without_norms(counted(model, 224, **options))
        work_figure = Figure(found.multiply_adds, multiply_adds, work, unit=1e9)
        if not work_figure.agrees:
            because = "the printed one is cut off, not rounded"
            work_figure = Figure(found.multiply_adds, multiply_adds, work, because, 1e9)
        rows.append(
            Row(
                name,
                [
                    Figure(found.parameters, parameters, exact, mixed.get(name, ""), 1e6),
                    work_figure,
                ],
            )
        )
    return Table(
        "IGC, table 6: ImageNet",
        "Convolutions and classifier, at 224²; parameters in millions, multiply-adds in 10⁹. The "
        "table's own rows mix conventions.",
        ("parameters", "MAdds"),
        rows,
    )


def _best() -> Table:
    rows = []
    for name, model, printed, exact in (
        ("IGC-L16M32", "igc_l16m32", "17.7M", 17_667_684),
        ("IGC-L450M2", "igc_l450m2", "19.3M", 19_273_600),
        ("IGC-L32M26", "igc_l32m26", "24.1M", 24_057_380),
    ):
        found = without_norms(counted(model, 32))
        rows.append(Row(name, [Figure(found.parameters, printed, exact)]))
    return Table(
        "IGC, table 7: 20 layers on CIFAR",
        "Convolutions and the classifier of 100 classes.",
        ("parameters",),
        rows,
    )
