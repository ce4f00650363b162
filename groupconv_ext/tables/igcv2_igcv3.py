"""The counts of "IGCV2" and "IGCV3", tables 2 to 11."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..counting import count
from ..nn import (
    DepthwiseSeparableConv2d,
    IGCV2Conv2d,
    InterleavedConv2d,
    PartitionedConv2d,
)
from .counted import counted, features, without_norms
from .figures import Figure, Row, Table

__all__ = ["tables"]


def tables() -> list[Table]:
    """Tables 2 to 6, 9 and 11; 1, 8 and 10 draw the networks."""
    return [
        _blocks_beside_xception(),
        _widths(),
        _depths_beside_xception(),
        _blocks_beside_igcv1(),
        _depths_beside_igcv1(),
        _mobilenet_v1(),
        _mobilenet_v2(),
    ]


# ---- one block ----------------------------------------------------------------------------------


def _block_row(
    name: str, layer: nn.Module, channels: int, exact: int, about: tuple[str, str]
) -> Row:
    found = count(layer, (channels, 32, 32))
    figures = [
        Figure(found.parameters, about[0], exact),
        Figure(found.multiply_adds, about[1], exact * 1024),
        Figure(channels, str(channels)),
    ]
    return Row(name, figures)


def _structured(channels: int, branch: int) -> nn.Module:
    return IGCV2Conv2d(channels, channels, 3, 1, 1, bias=False, branch_channels=(branch, branch))


def _blocks_beside_xception() -> Table:
    rows = []
    for (channels, exact), (wider, branch, wider_exact), about in (
        ((64, 4672), (144, 12, 4752), ("≈4700", "≈4800000")),
        ((96, 10080), (256, 16, 10496), ("≈10000", "≈10000000")),
        ((128, 17536), (361, 19, 16967), ("≈17000", "≈17000000")),
    ):
        layer = DepthwiseSeparableConv2d(channels, channels, 3, 1, 1, bias=False)
        rows.append(_block_row("Xception", layer, channels, exact, about))
        rows.append(_block_row("IGCV2", _structured(wider, branch), wider, wider_exact, about))
    return Table(
        "IGCV2, table 2: a block beside Xception's",
        "The weights of one block, with a 3×3, and its work at 32². K² = C.",
        ("parameters", "FLOPs", "C"),
        rows,
    )


def _blocks_beside_igcv1() -> Table:
    rows = []
    for igcv1, first, second, about in (
        ((64, 3200), (98, 7, 3136), (100, 10, 2900), ("≈3000", "≈3200000")),
        ((96, 6336), (162, 9, 5832), (169, 13, 5915), ("≈6000", "≈6100000")),
        ((128, 10496), (242, 11, 9680), (256, 16, 10496), ("≈10000", "≈11000000")),
    ):
        channels, exact = igcv1
        layer: nn.Module = InterleavedConv2d(
            channels, channels, 3, 1, 1, bias=False, primary_groups=channels // 2
        )
        rows.append(_block_row("IGCV1", layer, channels, exact, about))
        channels, branch, exact = first
        pairs = PartitionedConv2d(channels, channels, 3, 1, 1, groups=channels // 2, bias=False)
        pointwise = [
            PartitionedConv2d(channels, channels, 1, groups=channels // branch, bias=False)
            for _ in range(2)
        ]
        layer = nn.Sequential(pairs, *pointwise)
        rows.append(_block_row("IGCV2 I", layer, channels, exact, about))
        channels, branch, exact = second
        rows.append(_block_row("IGCV2 II", _structured(channels, branch), channels, exact, about))
    return Table(
        "IGCV2, table 5: a block beside IGCV1's",
        "The weights of one block, with a 3×3, and its work at 32². IGCV1 has two channels a "
        "group, so has the first convolution of I; that of II is channelwise.",
        ("parameters", "FLOPs", "C"),
        rows,
    )


# ---- networks on CIFAR --------------------------------------------------------------------------

UP = "the printed figure is rounded up"
CUT = "the printed figure is cut off, not rounded"
SHORTCUTS = "the paper does not say what stands in a shortcut where the width doubles; ours has "
DENSE = SHORTCUTS + "a dense 1×1, which gives table 4's figures exactly, and here too much"
NONE = SHORTCUTS + "no parameters, which gives the printed parameters and 1 to 2 % too little work"
HALF = SHORTCUTS + "a 1×1 in x/2 groups, which gives table 4's figures exactly, and here 1 % less"

# Parameters in millions and work in 10⁸: as printed, exactly, and why they differ.
Printed = tuple[str, int, str]


def _network_row(
    name: str, model: str, parameters: Printed, work: Printed, unit: float, options: dict[str, Any]
) -> Row:
    found = features(counted(model, 32, **options))
    return Row(
        name,
        [
            Figure(found.parameters, *parameters, unit=1e6),
            Figure(found.multiply_adds, *work, unit=unit),
        ],
    )


def _cifar_table(number: int, title: str, rows: list[Row], power: str) -> Table:
    return Table(
        f"IGCV2, table {number}: {title}",
        f"Convolutions, without the classifier, at 32²; parameters in millions, FLOPs in {power}.",
        ("parameters", "FLOPs"),
        rows,
    )


def _widths() -> Table:
    networks = (
        ("Xception", "xception_cifar", 58, ("0.44", 445_788, CUT), ("0.67", 69_020_928, DENSE)),
        ("IGCV1", "igcv1_cifar", 96, ("0.40", 398_496, ""), ("0.82", 82_477_056, "")),
        ("IGCV2*", "igcv2_star", 216, ("0.32", 319_120, ""), ("0.76", 74_877_952, NONE)),
        ("Xception", "xception_cifar", 71, ("0.66", 662_004, ""), ("0.98", 101_503_872, DENSE)),
        ("IGCV1", "igcv1_cifar", 126, ("0.60", 602_406, ""), ("1.28", 128_572_416, CUT)),
        ("IGCV2*", "igcv2_star", 304, ("0.48", 474_528, UP), ("1.12", 110_843_904, NONE)),
        ("Xception", "xception_cifar", 83, ("0.89", 899_388, CUT), ("1.31", 137_017_728, DENSE)),
        ("IGCV1", "igcv1_cifar", 150, ("0.79", 792_750, ""), ("1.72", 172_416_000, "")),
        ("IGCV2*", "igcv2_star", 416, ("0.65", 648_128, ""), ("1.52", 150_425_600, NONE)),
    )
    rows = [
        _network_row(f"{name} (C{width})", model, parameters, work, 1e8, {"width": width})
        for name, model, width, parameters, work in networks
    ]
    return _cifar_table(3, "20 layers of various widths", rows, "10⁸")


def _depths_beside_xception() -> Table:
    rows = []
    for depth, xception, igcv2 in (
        (8, (("0.056", 55_860), ("0.095", 9_502_080)), (("0.047", 47_232), ("0.095", 9_510_912))),
        (
            20,
            (("0.168", 167_580), ("0.268", 26_812_800)),
            (("0.149", 149_376), ("0.262", 26_222_592)),
        ),
        (
            26,
            (("0.223", 223_440), ("0.355", 35_468_160)),
            (("0.200", 200_448), ("0.346", 34_578_432)),
        ),
    ):
        for name, model, width, (parameters, work) in (
            ("Xception (C35)", "xception_cifar", 35, xception),
            ("IGCV2 (C64)", "igcv2_cifar", 64, igcv2),
        ):
            options = {"width": width, "depth": depth}
            printed = (*parameters, ""), (*work, "")
            rows.append(_network_row(f"D={depth} {name}", model, *printed, 1e8, options))
    return _cifar_table(4, "various depths, beside Xception", rows, "10⁸")


def _depths_beside_igcv1() -> Table:
    rows = []
    for depth, igcv1, igcv2 in (
        (
            8,
            (("0.046", 46_032, ""), ("1.00", 9_977_856, "")),
            (("0.046", 46_240, ""), ("1.18", 11_683_840, HALF)),
        ),
        (
            20,
            (("0.151", 150_864, ""), ("2.89", 28_852_224, "")),
            (("0.144", 144_480, ""), ("3.20", 31_918_080, HALF)),
        ),
        (
            26,
            (("0.203", 203_280, ""), ("3.83", 38_289_408, "")),
            (("0.193", 193_600, CUT), ("4.21", 42_035_200, HALF)),
        ),
    ):
        first = {"depth": depth, "width": 48}
        second = {"depth": depth, "width": 80, "branches": (10, 16, 20)}
        rows += [
            _network_row(f"D={depth} IGCV1 (C48)", "igcv1_cifar", *igcv1, 1e7, first),
            _network_row(f"D={depth} IGCV2 (C80)", "igcv2_cifar", *igcv2, 1e7, second),
        ]
    return _cifar_table(6, "various depths, beside IGCV1", rows, "10⁷")


# ---- networks on ImageNet -----------------------------------------------------------------------


def _mobilenet_v1() -> Table:
    column = "the printed figure repeats MobileNet's column"
    rows = []
    for name, model, width, parameters, work in (
        ("MobileNet-1.0", "mobilenet_v1", 1.0, ("4.2", 4_210_088, ""), ("569", 568_740_352, "")),
        ("IGCV2-1.0", "igcv2", 1.0, ("4.1", 4_092_288, ""), ("564", 564_864_000, CUT)),
        ("MobileNet-0.5", "mobilenet_v1", 0.5, ("1.3", 1_320_648, ""), ("149", 149_497_088, "")),
        (
            "IGCV2-0.5",
            "igcv2",
            0.5,
            ("1.3", 1_173_824, column),
            ("156", 155_456_000, UP),
        ),
        ("MobileNet-0.25", "mobilenet_v1", 0.25, ("0.5", 464_600, ""), ("41", 41_030_272, "")),
        ("IGCV2-0.25", "igcv2", 0.25, ("0.5", 368_832, column), ("46", 45_984_000, "")),
    ):
        rows.append(_imagenet_row(name, model, width, parameters, work))
    return Table(
        "IGCV2, table 9: beside MobileNetV1",
        "Convolutions and classifier, at 224², in millions.",
        ("parameters", "FLOPs"),
        rows,
        ["Table 8 prints ten blocks at 14² for both networks; five of them give these figures."],
    )


def _mobilenet_v2() -> Table:
    tens = "the printed figure is rounded to tens"
    last = "ours keeps the last 1×1 at 1280 channels, as the published MobileNetV2 does"
    rows = []
    for name, model, width, parameters, work in (
        (
            "MobileNetV2-0.7",
            "mobilenet_v2",
            0.7,
            ("1.9", 2_481_384, last),
            ("160", 173_642_400, last),
        ),
        ("IGCV3-0.7", "igcv3", 0.7, ("2.0", 2_023_864, ""), ("170", 172_867_968, tens)),
        ("MobileNetV1", "mobilenet_v1", 1.0, ("4.2", 4_231_976, ""), ("569", 568_740_352, "")),
        (
            "MobileNetV2-1.0",
            "mobilenet_v2",
            1.0,
            ("3.4", 3_504_872, "the printed figure is MobileNetV2's own; no count gives it"),
            ("300", 300_774_272, tens),
        ),
        (
            "IGCV3-1.0",
            "igcv3",
            1.0,
            ("3.5", 3_491_688, ""),
            ("320", 312_970_176, "the printed figure is 2 % above the authors' network"),
        ),
    ):
        rows.append(_imagenet_row(name, model, width, parameters, work, norms=True))
    return Table(
        "IGCV3, table 11: beside MobileNetV2",
        "All parameters, and the work of convolutions and classifier, at 224², in millions.",
        ("parameters", "FLOPs"),
        rows,
    )


def _imagenet_row(
    name: str, model: str, width: float, parameters: Printed, work: Printed, norms: bool = False
) -> Row:
    found = counted(model, 224, width=width)
    bare = without_norms(found)
    return Row(
        name,
        [
            Figure(found.parameters if norms else bare.parameters, *parameters, unit=1e6),
            Figure(bare.multiply_adds, *work, unit=1e6),
        ],
    )
