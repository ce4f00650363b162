"""The problems: layers of published networks, and what each must cost at the very least.

A ``Problem`` is one convolution under one Partition, batch, layout, dtype and direction. The layers
are listed as data, each with the partition that its network gives it; the suites vary them. Two
numbers come with a problem before any kernel is run: its multiply-adds, and its bytes if every
value that is needed moves once. Over the machine's FMA peak and its bandwidth, the larger of the
two times is the floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from groupconv_ext.partition import Partition

Kind = Literal["contiguous", "interleaved", "shuffled", "permuted", "ragged", "overlapping"]
Layout = Literal["NCHW", "NHWC"]
Dtype = Literal["float32", "bfloat16", "float16"]
Direction = Literal["forward", "forward+backward"]

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Floor(NamedTuple):
    """The least time a problem can take on a machine, and which of the two limits sets it."""

    seconds: float
    bound: Literal["compute", "memory"]


@dataclass(frozen=True)
class Problem:
    """One convolution to time. Defaults: the network's layer at batch 1, forward, float32, NCHW."""

    network: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int
    kind: Kind
    batch: int = 1
    layout: Layout = "NCHW"
    dtype: Dtype = "float32"
    direction: Direction = "forward"

    @property
    def shape(self) -> str:
        """The layer without its variant, as people write it: ``1×1 256→256 56² G8``."""
        size = f"{self.height}²" if self.height == self.width else f"{self.height}×{self.width}"
        stride = f" s{self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels}→{self.out_channels}"
        return f"{self.kernel}×{self.kernel} {channels} {size}{stride} G{self.groups}"

    @property
    def label(self) -> str:
        """The shape, and the dtype where it is not the usual one."""
        return self.shape if self.dtype == "float32" else f"{self.shape} {self.dtype}"

    @property
    def name(self) -> str:
        """A unique name in plain ASCII, which is what ``--filter`` searches."""
        shape = self.shape.replace("²", f"x{self.width}").replace("×", "x").replace("→", "-")
        variant = f"{self.kind} N{self.batch} {self.layout} {self.dtype} {self.direction}"
        return f"{self.network} {shape} {variant}"

    @property
    def trains(self) -> bool:
        """Whether gradients of input and weight are part of the work."""
        return self.direction == "forward+backward"

    @property
    def is_depthwise(self) -> bool:
        """Whether every group reads one channel and writes one."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def channels_per_group(self) -> int:
        """Inputs that an average group reads: what decides how well a kernel can do."""
        return round(sum(n_in for _, n_in in self.partition.sizes) / self.groups)

    @property
    def partition(self) -> Partition:
        """The Partition, made once for each shape and kind."""
        return _partition(self.kind, self.in_channels, self.out_channels, self.groups)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of input, weight and output."""
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout in PyTorch's own word."""
        return torch.channels_last if self.layout == "NHWC" else torch.contiguous_format

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output map."""
        return (
            (self.height + 2 * self.padding - self.kernel) // self.stride + 1,
            (self.width + 2 * self.padding - self.kernel) // self.stride + 1,
        )

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds, taps on the padding included; a backward pass is two more such."""
        out_height, out_width = self.output_size
        forward = self.partition.entries * self.kernel**2 * self.batch * out_height * out_width
        return 3 * forward if self.trains else forward

    @property
    def bytes(self) -> int:
        """The least traffic: what some tap needs is read once, every result is written once.

        Backward reads the output gradient, the input and the weight once, for both gradients
        together, and writes an input gradient and a weight gradient.
        """
        rows = _touched(self.height, self.kernel, self.stride, self.padding)
        columns = _touched(self.width, self.kernel, self.stride, self.padding)
        channels_read = len({channel for group in self.partition.inputs for channel in group})
        out_height, out_width = self.output_size
        read = self.batch * channels_read * rows * columns
        output = self.batch * self.out_channels * out_height * out_width
        weight = self.partition.entries * self.kernel**2
        values = read + weight + output
        if self.trains:
            input_gradient = self.batch * self.in_channels * self.height * self.width
            values += output + read + weight + input_gradient + weight
        return values * self.torch_dtype.itemsize

    def floor(self, flops_per_second: float, bytes_per_second: float) -> Floor:
        """The larger of the time to multiply and the time to move."""
        compute = 2 * self.multiply_adds / flops_per_second
        memory = self.bytes / bytes_per_second
        return Floor(compute, "compute") if compute >= memory else Floor(memory, "memory")


def _touched(size: int, kernel: int, stride: int, padding: int) -> int:
    """How many of ``size`` positions any tap reads: a strided 1×1 skips most of them."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    taps = {o * stride + k - padding for o in range(outputs) for k in range(kernel)}
    return sum(0 <= tap < size for tap in taps)


# ---- partitions ----------------------------------------------------------------------------------


@cache
def _partition(kind: Kind, in_channels: int, out_channels: int, groups: int) -> Partition:
    match kind:
        case "contiguous":
            return Partition.contiguous(in_channels, out_channels, groups)
        case "interleaved":
            return Partition.interleaved(in_channels, out_channels, groups)
        case "shuffled":
            return Partition.shuffled(in_channels, out_channels, groups)
        case "permuted":
            return Partition.random(in_channels, out_channels, groups, seed=0)
        case "ragged":
            return _ragged(in_channels, out_channels, groups)
        case "overlapping":
            return _overlapping(in_channels, out_channels, groups)


def _ragged(in_channels: int, out_channels: int, groups: int) -> Partition:
    """Random labels with sizes off every vector width, yet exactly the even split's work.

    Sizes deviate from the mean with signs ++−− for inputs and +−+− for outputs over each four
    groups (of two or three left over, +− and none), so that Σ out · in stays what it was and a
    ragged time compares directly with an even one.
    """
    fours, rest = divmod(groups, 4)
    in_signs = [1, 1, -1, -1] * fours + ([1, -1, 0][:rest] if rest > 1 else [])
    out_signs = [1, -1, 1, -1] * fours
    rng = np.random.default_rng(0)
    in_labels, out_labels = (
        rng.permutation(np.repeat(np.arange(groups), _sizes(channels, groups, signs)))
        for channels, signs in ((in_channels, in_signs), (out_channels, out_signs))
    )
    return Partition.from_labels(in_labels, out_labels, groups)


def _sizes(channels: int, groups: int, signs: Sequence[int]) -> list[int]:
    """The mean size plus or minus a deviation: about 40%, odd, and never the whole group."""
    mean = channels // groups
    deviation = min(int(0.4 * mean) | 1, mean - 1)
    return [mean + sign * deviation for sign in [*signs, *[0] * (groups - len(signs))]]


def _overlapping(in_channels: int, out_channels: int, groups: int) -> Partition:
    """CondenseNet's index layer: each group picks its own 1/G of all inputs, so that lists overlap.

    Outputs are interleaved, because a shuffle follows the learned group convolution.
    """
    rng = np.random.default_rng(0)
    size = in_channels // groups
    inputs = [np.sort(rng.permutation(in_channels)[:size]) for _ in range(groups)]
    outputs = [list(range(group, out_channels, groups)) for group in range(groups)]
    return Partition.from_lists(inputs, outputs, in_channels=in_channels, out_channels=out_channels)


# ---- layers --------------------------------------------------------------------------------------


def pointwise(
    network: str, channels: tuple[int, int], size: int, groups: int, kind: Kind, stride: int = 1
) -> Problem:
    """A 1×1 layer, channels in → out."""
    return Problem(network, *channels, size, size, 1, stride, 0, groups, kind)


def spatial(
    network: str, channels: int, size: int, groups: int, stride: int = 1, out: int | None = None
) -> Problem:
    """A 3×3 layer that keeps the map, or halves it at stride 2."""
    out_channels = channels if out is None else out
    return Problem(network, channels, out_channels, size, size, 3, stride, 1, groups, "contiguous")


def depthwise(network: str, channels: int, size: int, stride: int = 1) -> Problem:
    """A 3×3 layer with one channel in every group."""
    return spatial(network, channels, size, channels, stride)


# The layers whose speed the project promises, row for row.
PROMISED: tuple[Problem, ...] = (
    pointwise("resnet50-flgc", (256, 256), 56, 4, "permuted"),
    pointwise("resnet50-flgc", (256, 256), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 256), 56, 32, "permuted"),
    pointwise("resnet50-flgc", (512, 512), 28, 8, "permuted"),
    pointwise("resnet50-flgc", (1024, 1024), 14, 8, "permuted"),
    pointwise("resnet50-flgc", (2048, 2048), 7, 8, "permuted"),
    pointwise("resnet50-flgc", (2048, 2048), 7, 32, "permuted"),
    spatial("resnext50", 128, 56, 32),
    spatial("resnext50", 256, 28, 32),
    spatial("resnext50", 256, 28, 8),
    spatial("resnext50", 1024, 7, 32),
    depthwise("resnet50-flgc", 256, 28),
)

# ResNet50-FLGC at 224²: every 1×1 learns its groups, every 3×3 is a depthwise 3×3 and a 1×1.
RESNET50_FLGC = (
    pointwise("resnet50-flgc", (64, 64), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (64, 256), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 64), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 128), 56, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 512), 56, 8, "permuted", stride=2),
    pointwise("resnet50-flgc", (128, 128), 28, 8, "permuted"),
    pointwise("resnet50-flgc", (128, 512), 28, 8, "permuted"),
    pointwise("resnet50-flgc", (512, 128), 28, 8, "permuted"),
    pointwise("resnet50-flgc", (512, 1024), 28, 8, "permuted", stride=2),
    pointwise("resnet50-flgc", (256, 256), 28, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 256), 14, 8, "permuted"),
    pointwise("resnet50-flgc", (256, 1024), 14, 8, "permuted"),
    pointwise("resnet50-flgc", (1024, 256), 14, 8, "permuted"),
    pointwise("resnet50-flgc", (1024, 2048), 14, 8, "permuted", stride=2),
    pointwise("resnet50-flgc", (512, 512), 7, 8, "permuted"),
    pointwise("resnet50-flgc", (512, 2048), 7, 8, "permuted"),
    pointwise("resnet50-flgc", (2048, 512), 7, 8, "permuted"),
    depthwise("resnet50-flgc", 64, 56),
    depthwise("resnet50-flgc", 128, 28),
    depthwise("resnet50-flgc", 256, 14),
    depthwise("resnet50-flgc", 512, 7),
)

# ResNeXt50 32×4d, and the same layers in eight groups.
RESNEXT50 = (
    spatial("resnext50", 128, 56, 8),
    spatial("resnext50", 256, 56, 32, stride=2),
    spatial("resnext50", 512, 14, 32),
    spatial("resnext50", 512, 14, 8),
    spatial("resnext50", 512, 28, 32, stride=2),
    spatial("resnext50", 1024, 7, 8),
    spatial("resnext50", 1024, 14, 32, stride=2),
)

# MobileNetV2, its 1×1 layers grouped.
MOBILENETV2 = (
    depthwise("mobilenetv2", 32, 112),
    depthwise("mobilenetv2", 96, 112, stride=2),
    depthwise("mobilenetv2", 144, 56),
    depthwise("mobilenetv2", 192, 28),
    depthwise("mobilenetv2", 384, 14),
    depthwise("mobilenetv2", 576, 14, stride=2),
    depthwise("mobilenetv2", 960, 7),
    pointwise("mobilenetv2", (16, 96), 112, 4, "permuted"),
    pointwise("mobilenetv2", (24, 144), 56, 4, "permuted"),
    pointwise("mobilenetv2", (144, 24), 56, 4, "permuted"),
    pointwise("mobilenetv2", (32, 192), 28, 4, "permuted"),
    pointwise("mobilenetv2", (64, 384), 14, 4, "permuted"),
    pointwise("mobilenetv2", (576, 96), 14, 4, "permuted"),
    pointwise("mobilenetv2", (160, 960), 7, 4, "permuted"),
    pointwise("mobilenetv2", (320, 1280), 7, 4, "permuted"),
)

# ShuffleNet 1×, g = 3: the first 1×1 of a unit is followed by the shuffle.
SHUFFLENET = (
    pointwise("shufflenet-g3", (240, 60), 28, 3, "shuffled"),
    pointwise("shufflenet-g3", (60, 240), 28, 3, "contiguous"),
    pointwise("shufflenet-g3", (480, 120), 14, 3, "shuffled"),
    pointwise("shufflenet-g3", (120, 480), 14, 3, "contiguous"),
    pointwise("shufflenet-g3", (960, 240), 7, 3, "shuffled"),
    pointwise("shufflenet-g3", (240, 960), 7, 3, "contiguous"),
    depthwise("shufflenet-g3", 60, 28),
    depthwise("shufflenet-g3", 240, 7),
)

# CondenseNet-74, G = C = 4, converted: an index layer with overlapping lists, then 3×3 groups.
CONDENSENET = (
    pointwise("condensenet", (272, 128), 28, 4, "overlapping"),
    pointwise("condensenet", (720, 256), 14, 4, "overlapping"),
    pointwise("condensenet", (1552, 512), 7, 4, "overlapping"),
    spatial("condensenet", 128, 28, 4, out=32),
    spatial("condensenet", 256, 14, 4, out=64),
    spatial("condensenet", 512, 7, 4, out=128),
)

# IGC-L24M2 and IGC-L4M8 on CIFAR: L groups of M channels, then interleaved 1×1 groups of L.
# M doubles from stage to stage.
IGC = tuple(
    layer
    for partitions, first_width, network in ((24, 2, "igc-l24m2"), (4, 8, "igc-l4m8"))
    for size, width in ((32, first_width), (16, 2 * first_width), (8, 4 * first_width))
    for layer in (
        spatial(network, partitions * width, size, partitions),
        pointwise(network, (partitions * width,) * 2, size, width, "interleaved"),
    )
)

LAYERS: tuple[Problem, ...] = (
    PROMISED + RESNET50_FLGC + RESNEXT50 + MOBILENETV2 + SHUFFLENET + CONDENSENET + IGC
)
