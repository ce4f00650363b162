"""The counts of "Dynamic grouping convolution / Groupable ConvNets", tables 2 to 6."""

from __future__ import annotations

from .. import models
from ..nn import DGConv2d, ResourceConstraint
from .counted import counted, without_norms
from .figures import Figure, Row, Table

__all__ = ["tables"]

CUT = "the printed figure is cut off, not rounded"


def tables() -> list[Table]:
    """Tables 2 to 5; 6 has no counts, its networks are those of given numbers of groups."""
    return [_sizes(), _constraints(), _twice(), _repetitions()]


def _gates(groups: int) -> dict[int, tuple[int, ...]]:
    """Gates for ``groups`` groups of neighbouring channels in every width of a ResNeXt."""
    closed = groups.bit_length() - 1
    return {
        channels: (0,) * closed + (1,) * (channels.bit_length() - 1 - closed)
        for channels in (128, 256, 512, 1024)
    }


def _with_groups(model: str, groups: int) -> int:
    """Parameters of a G-ResNeXt whose gates are those of ``groups`` groups everywhere."""
    return counted(model, 224, gates=_gates(groups).__getitem__).parameters


def _sizes() -> Table:
    rows = []
    for name, printed, exact, because in (
        ("resnet50", "25M", 25_557_032, CUT),
        ("resnext50", "25M", 25_028_904, ""),
        ("resnet101", "44M", 44_549_160, CUT),
        ("resnext101", "44M", 44_177_704, ""),
    ):
        found = counted(name, 224)
        rows.append(Row(name, [Figure(found.parameters, printed, exact, because)]))
    spends = "the gates are not published; ours spends the budget, the paper's network less than it"
    for name, printed, exact, because in (
        ("groupable_resnext50", "25M", 25_028_904, ""),
        ("groupable_resnext101", "43M", 44_177_704, spends),
    ):
        ours = _with_groups(name, 32)
        line = f"{name}, gates of 32 groups (b=32)"
        rows.append(Row(line, [Figure(ours, printed, exact, because)]))
    for name, exact in (("groupable_resnext50", 24_321_576), ("groupable_resnext101", 42_843_688)):
        ours = _with_groups(name, 64)
        rows.append(Row(f"{name}, gates of 64 groups", [Figure(ours, exact=exact)]))
    return Table(
        "DGConv, table 2: ResNeXt and Groupable ResNeXt",
        "All parameters but the gates; a learned layer by the gates it is given.",
        ("parameters",),
        rows,
    )


PRINTED = {
    "groupable_resnext50": {32: "0.83", 48: "0.61", 64: "0.39", 96: "0.27", 128: "0.20"},
    "groupable_resnext101": {
        32: "0.70",
        48: "0.58",
        64: "0.47",
        96: "0.22",
        128: "0.22",
        256: "0.14",
    },
}
SQUARES = {"groupable_resnext50": 5_029_888, "groupable_resnext101": 9_486_336}  # Σ C²


def _constraints() -> Table:
    rows = []
    learned = "learned: the constraint is a limit, and the network stays below it"
    beyond = "learned: above its own limit, for the constraint is soft"
    for name, printed in PRINTED.items():
        network = models.create(name, device="meta")
        layers = [layer for layer in network.modules() if isinstance(layer, DGConv2d)]
        squares = sum(layer.in_channels * layer.out_channels for layer in layers)
        rows.append(Row(f"{name}, Σ C²", [None, Figure(squares, exact=SQUARES[name])]))
        for b, ratio in printed.items():
            budget = ResourceConstraint(network, b).budget
            limit = budget / (squares / 32)
            because = beyond if float(ratio) > limit else learned
            figures = [
                Figure(limit, ratio, 32 / b, because),
                Figure(budget, exact=SQUARES[name] / b),
            ]
            rows.append(Row(f"{name}, b={b}", figures))
    return Table(
        "DGConv, table 3: complexity of the grouped convolutions, by the constraint",
        "The paper's is what was learned, over ResNeXt 32×4d. Ours is the limit o it learned "
        "under, as a ratio and in connections.",
        ("GConv FLOPs", "limit o"),
        rows,
    )


def _twice() -> Table:
    single = without_norms(counted("resnet101", 224)).multiply_adds
    rows = []
    for name, options, exact in (
        ("ResNeXt101 64×4d", {"width": 256, "groups": 64}, 15_460_270_080),
        ("ResNeXt101 2×64d", {"groups": 2}, 15_123_087_360),
    ):
        found = without_norms(counted("resnext101", 224, **options)).multiply_adds
        rows.append(Row(name, [Figure(found / single, "2×"), Figure(found, exact=exact)]))
    return Table(
        "DGConv, table 4: twice as complex as ResNet101",
        "Convolutions and classifier, at 224². G-ResNeXt101 (b=2) may have what 2×64d has.",
        ("complexity", "MAdds"),
        rows,
    )


def _repetitions() -> Table:
    """What the printed parameters say of the gates: how many connections they leave."""
    fixed = _with_groups("groupable_resnext101", 32) - 9 * SQUARES["groupable_resnext101"] // 32
    budget = SQUARES["groupable_resnext101"] / 32
    rows = []
    for name, printed in (("first", 43.3e6), ("R2", 43.8e6), ("R3", 43.0e6)):
        connections = (printed - fixed) / 9
        rows.append(Row(f"G-ResNeXt101, {name}", [Figure(connections / budget)]))
    return Table(
        "DGConv, table 5: three repetitions of G-ResNeXt101 (b=32)",
        "The gates are not published. The printed 43.3, 43.8 and 43.0M parameters leave these "
        "parts of the budget o to the grouped convolutions; table 3 prints 0.70 for the first.",
        ("connections over o",),
        rows,
    )
