"""What the tests of the CUDA kernels on the CPU share: problems, and what rounding may change."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_on_cpu import build as builder

from groupconv_ext import Partition, reference
from groupconv_ext.window import POINTWISE, Window

CUDA_ON_CPU = [
    pytest.mark.native,
    pytest.mark.cuda_on_cpu,
    pytest.mark.skipif(
        builder.COMPILER is None or not builder.CSRC.is_dir(),
        reason="needs g++ and the native sources",
    ),
]
"""The marks of such a test."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}


@dataclass
class Problem:
    partition: Partition
    batch: int = 2
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (1, 1)
    window: Window = POINTWISE

    def tensors(self, dtype: torch.dtype, channels_last: bool) -> tuple[torch.Tensor, ...]:
        p = self.partition
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(self.batch, p.in_channels, *self.size).to(dtype)
        weight = torch.randn(p.entries, *self.kernel).to(dtype)
        return x.contiguous(memory_format=layout), weight, torch.randn(p.out_channels).to(dtype)

    def reference(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str = "none",
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        w = self.window
        geometry = (w[0], w[1]), (w[2], w[3], w[4], w[5]), (w[6], w[7])
        return reference.conv2d(x, weight, bias, self.partition, *geometry, activation, residual)


def overlapping() -> Partition:
    inputs = [[0, 3, 5], [], [5, 1, 0, 6, 2]]
    outputs = [[4, 0], [2, 5], [1, 3, 6]]
    return Partition.from_lists(inputs, outputs, in_channels=8, out_channels=7)


def wide_overlap() -> Partition:
    inputs = [list(range(39)), list(range(20, 61)), list(range(10, 30))]
    outputs = [list(range(33)), list(range(33, 70)), list(range(70, 81))]
    return Partition.from_lists(inputs, outputs, in_channels=64, out_channels=81)


ODD = Window(2, 3, 0, 2, 3, 1, 2, 1)
SAME = Window(1, 1, 1, 1, 1, 1, 1, 1)
CASES = {
    "pointwise": Problem(Partition.contiguous(16, 8, 2)),
    "wider than a tile": Problem(Partition.random(40, 140, 2, seed=1), size=(9, 9)),
    "deeper than a step": Problem(Partition.random(140, 6, 2, seed=2, uneven=True)),
    "depthwise": Problem(Partition.contiguous(12, 12, 12), 1, (20, 17), (3, 3), SAME),
    "overlap, no inputs": Problem(overlapping(), 2, (5, 6), (3, 2), ODD),
    "wide overlap": Problem(wide_overlap(), 1, (4, 5), (2, 2), ODD),
    "strided": Problem(
        Partition.random(48, 36, 3, seed=4), 2, (9, 8), (3, 3), Window(2, 2, 1, 1, 1, 1, 1, 1)
    ),
    "stride beyond the image": Problem(
        Partition.interleaved(6, 4, 2), 2, (3, 2), (2, 1), Window(7, 9, 2, 1, 0, 1, 1, 1)
    ),
    "more padding than image": Problem(
        Partition.interleaved(4, 4, 2), 2, (1, 2), (2, 2), Window(1, 1, 3, 3, 3, 3, 1, 1)
    ),
    "neighbours in memory": Problem(Partition.contiguous(128, 136, 2), 2, (8, 24)),
    "many pixels": Problem(Partition.random(40, 72, 2, seed=9), 2, (30, 33)),
    "more weights than fit": Problem(Partition.random(160, 70, 1, seed=6), 1, (6, 7), (3, 3), SAME),
    "small groups": Problem(Partition.random(96, 96, 16, seed=7), 2, (8, 9), (3, 3), SAME),
    "more groups than threads": Problem(Partition.random(1100, 1100, 1100, seed=3), 1, (1, 1)),
}


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[dtype] * (expected.norm() + 1e-30), error / expected.norm()


def hostile_tables() -> dict[str, np.ndarray]:
    """Tables like that of overlapping(), each wrong in one number."""
    sound = overlapping().cpu_table.numpy()
    groups, reads = int(sound[2]), int(sound[3])
    in_offsets, out_offsets = 4, 4 + groups + 1
    inputs = out_offsets + groups + 1
    outputs = inputs + reads
    changes = {
        "in_channels": (0, 9),
        "out_channels": (1, 2**31 - 1),
        "no groups": (2, 0),
        "negative groups": (2, -3),
        "too many groups": (2, 2**31 - 1),
        "negative reads": (3, -(2**31)),
        "too many reads": (3, 2**31 - 1),
        "first offset": (in_offsets, -1),
        "falling offset": (in_offsets + 1, 100),
        "negative offset": (out_offsets + 1, -5),
        "last offset": (out_offsets + groups, 100),
        "input too large": (inputs, 8),
        "input negative": (inputs + 1, -1),
        "output too large": (outputs, 7),
        "output negative": (outputs + 2, -(2**31)),
        "output twice": (outputs, int(sound[outputs + 1])),
        "other block sizes": (out_offsets + 1, 1),
    }
    tables = {}
    for name, (position, value) in changes.items():
        tables[name] = sound.copy()
        tables[name][position] = value
    tables["too short"] = sound[: 8 + overlapping().out_channels]
    return tables
