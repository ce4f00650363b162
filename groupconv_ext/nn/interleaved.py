"""Interleaved group convolutions: IGCV1, IGCV2 and IGCV3's block.

IGCV1 (igcv1, eq. 5) is two group convolutions with nothing between them::

    x' = P W^d Pᵀ W^p x

W^p is k×k in L groups of M channels, W^d 1×1 in M groups of L, and P brings one channel of every
primary group into each secondary one: channel c goes to group c mod M. P is the order of the
secondary partition's lists, and costs nothing.

IGCV2 (igcv2_igcv3, eq. 4-5) goes on: a channelwise k×k convolution W_1, then L − 1 pointwise ones
with K_l channels a branch::

    y = P_L W_L … P_2 W_2 P_1 W_1 x

The composed kernel is dense with one path from every input to every output where K_2 · … · K_L = C
and each branch reads from all branches of the stages before it (eq. 6, :func:`complementary`); it
has the fewest weights where S·K_1 = K_2 = … = K_L (eq. 11, :func:`balanced`). All pointwise stages
run in one pass over the pixels (:func:`groupconv_ext.chain`).

IGCV3 puts two group convolutions of two groups around a channelwise one, as in MobileNetV2's block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from .. import _checks
from ..chain import chain
from ..functional import conv2d
from ..partition import Partition
from ..separable import separable_conv2d
from ..window import IntOrPair, Padding
from ._windowed import ParameterFactory, Windowed, check_backend
from .partitioned import PartitionedConv2d
from .shuffle import ShuffledConv2d

__all__ = [
    "IGCV2Conv2d",
    "IGCV3Block",
    "InterleavedConv2d",
    "balanced",
    "complementary",
    "compose",
]


class InterleavedConv2d(Windowed):
    """IGCV1: a k×k convolution in L groups, then a 1×1 one across them in M groups.

    The paper has neither a bias nor anything else between the two; a bias is added at the end.

    Attributes:
        primary: ``[N, C / L, kh, kw]``; carries stride, padding and dilation.
        secondary: ``[N, N / M, 1, 1]``, rows group after group of ``partitions["secondary"]``.
        bias: ``[N]`` or ``None``.
        partitions: The groups of both.
    """

    primary: nn.Parameter
    secondary: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        primary_groups: int,
        secondary_groups: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order (``groups`` stays 1), then its own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: Of the primary convolution, like stride, padding and dilation.
            stride: See ``kernel_size``.
            padding: See ``kernel_size``.
            dilation: See ``kernel_size``.
            groups: 1; the two kinds of groups have arguments of their own.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            primary_groups: L.
            secondary_groups: M; ``None`` for ``out_channels / L``, the paper's M, with which each
                secondary group has one channel of every primary one.
            backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.
        """
        super().__init__()
        _refuse_groups(groups, "primary_groups and secondary_groups")
        check_backend(backend)
        primary = Partition.contiguous(in_channels, out_channels, primary_groups)
        if secondary_groups is None:
            secondary_groups = out_channels // primary_groups
        secondary = Partition.interleaved(out_channels, out_channels, secondary_groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.partitions = {"primary": primary, "secondary": secondary}
        self.backend = backend
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        new = ParameterFactory(device, dtype)
        read = in_channels // primary_groups
        across = out_channels // secondary_groups
        self.primary = new(out_channels, read, *self.kernel_size)
        self.secondary = new(out_channels, across, 1, 1)
        self.register_parameter("bias", new(out_channels) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both as ``nn.Conv2d`` would start them as layers of their own."""
        nn.init.kaiming_uniform_(self.primary, a=5**0.5)
        nn.init.kaiming_uniform_(self.secondary, a=5**0.5)
        _reset_bias(self.bias, self.secondary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``."""
        x, padding = self._padded(x)
        return separable_conv2d(
            x,
            self.primary,
            self.secondary,
            pointwise_bias=self.bias,
            partition=self.partitions["primary"],
            pointwise_partition=self.partitions["secondary"],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )

    def compose(self) -> torch.Tensor:
        """The dense kernel ``[N, C, kh, kw]`` of both; differentiable."""
        return compose([self.primary, self.secondary], list(self.partitions.values()))

    def extra_repr(self) -> str:
        """The arguments."""
        parts = [f"{self.in_channels}, {self.out_channels}"]
        parts += [f"{name}_groups={p.groups}" for name, p in self.partitions.items()]
        return self._describe(*parts)


class IGCV2Conv2d(Windowed):
    """IGCV2: a channelwise k×k convolution and a chain of pointwise ones in small branches.

    Attributes:
        depthwise: ``[C, 1, kh, kw]``; carries stride, padding and dilation.
        stages: For every pointwise stage ``[N, K, 1, 1]``, rows group after group of its partition;
            the last one widens from C to N channels.
        bias: ``[N]`` or ``None``.
        partitions: ``"depthwise"``, ``"stages.0"``, …: the groups of each.
    """

    depthwise: nn.Parameter
    stages: nn.ParameterList
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        branch_channels: int | Sequence[int] | None = None,
        stages: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order (``groups`` stays 1), then its own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: Of the channelwise convolution, like stride, padding and dilation.
            stride: See ``kernel_size``.
            padding: See ``kernel_size``.
            dilation: See ``kernel_size``.
            groups: 1; see ``branch_channels``.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            branch_channels: K, the channels that a branch reads, one for all pointwise stages or
                one for each; ``None`` for the fewest weights, :func:`balanced`.
            stages: L − 1, how many pointwise stages there are. Default: the length of
                ``branch_channels``, or for one K as many as connect every channel with every
                other, ⌈log_K C⌉, or 2.
            backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.
        """
        super().__init__()
        _refuse_groups(groups, "branch_channels")
        check_backend(backend)
        in_channels = _checks.count("in_channels", in_channels)
        out_channels = _checks.count("out_channels", out_channels)
        sizes = _branch_sizes(in_channels, branch_channels, stages)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.backend = backend
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        pointwise = _branches(in_channels, out_channels, sizes)
        self.partitions = {
            "depthwise": Partition.contiguous(in_channels, in_channels, in_channels),
            **{f"stages.{s}": partition for s, partition in enumerate(pointwise)},
        }
        self._pointwise = pointwise
        new = ParameterFactory(device, dtype)
        self.depthwise = new(in_channels, 1, *self.kernel_size)
        self.stages = nn.ParameterList(
            new(partition.out_channels, size, 1, 1)
            for partition, size in zip(pointwise, sizes, strict=True)
        )
        self.register_parameter("bias", new(out_channels) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every stage as ``nn.Conv2d`` would start it as a layer of its own."""
        for weight in (self.depthwise, *self.stages):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        _reset_bias(self.bias, self.stages[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x``."""
        x, padding = self._padded(x)
        x = conv2d(
            x,
            self.depthwise,
            partition=self.partitions["depthwise"],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            backend=self.backend,
        )
        return chain(
            x, list(self.stages), self.bias, partitions=self._pointwise, backend=self.backend
        )

    def compose(self) -> torch.Tensor:
        """The dense kernel ``[N, C, kh, kw]`` of all stages; differentiable."""
        return compose([self.depthwise, *self.stages], list(self.partitions.values()))

    def extra_repr(self) -> str:
        """The arguments."""
        sizes = [partition.sizes[0][1] for partition in self._pointwise]
        parts = [f"{self.in_channels}, {self.out_channels}", f"branch_channels={sizes}"]
        return self._describe(*parts)


class IGCV3Block(nn.Module):
    """IGCV3's inverted residual, as the authors' network has it.

    1×1 in G groups to ``expansion`` times the channels, BN, shuffle · channelwise 3×3, BN, ReLU6 ·
    1×1 in G groups, BN; no activation after the first and the last. The shuffle is the order of the
    first convolution's outputs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 6,
        groups: int = 2,
        *,
        second_shuffle: bool = False,
        skip: bool | None = None,
        backend: str = "auto",
    ) -> None:
        """Make the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: Of the channelwise convolution.
            expansion: How many times wider the block is inside.
            groups: Of both pointwise convolutions.
            second_shuffle: Shuffle the output as well, as the paper draws it and the released
                network does not.
            skip: Add the input to the output. Default: where their shapes are the same.
            backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.
        """
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        if skip and not same:
            raise ValueError(
                f"skip is True for {in_channels} → {out_channels} channels with stride {stride}; "
                "expected as many channels on both sides and stride 1"
            )
        self.skip = same if skip is None else skip
        hidden = in_channels * _checks.count("expansion", expansion)
        self.expand = ShuffledConv2d(
            in_channels, hidden, 1, groups=groups, bias=False, backend=backend
        )
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = PartitionedConv2d(
            hidden, hidden, 3, stride, 1, groups=hidden, bias=False, backend=backend
        )
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.activation = nn.ReLU6()
        last = ShuffledConv2d if second_shuffle else PartitionedConv2d
        self.project = last(hidden, out_channels, 1, groups=groups, bias=False, backend=backend)
        self.project_norm = nn.BatchNorm2d(out_channels)
        self._adds = False

    def after_fold(self) -> None:
        """Let the last convolution add the shortcut."""
        self._adds = self.skip and isinstance(self.project_norm, nn.Identity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to ``x``."""
        y: torch.Tensor = self.expand_norm(self.expand(x))
        y = self.activation(self.depthwise_norm(self.depthwise(y)))
        if self._adds:
            y = self.project(y, residual=x)
        else:
            y = self.project_norm(self.project(y))
            y = x + y if self.skip else y
        return y


# ---- the conditions ----------------------------------------------------------------------------


def complementary(partitions: Sequence[Partition]) -> bool:
    """Whether the stages compose a dense kernel with exactly one path for each pair of channels."""
    paths: torch.Tensor | None = None
    for partition in partitions:
        # float64 counts exactly: more paths than 2^53 were not one long before.
        mask = partition.mask(torch.float64)
        paths = mask if paths is None else mask @ paths
    return paths is not None and bool((paths == 1).all())


def balanced(channels: int, window: int, stages: int) -> tuple[int, ...]:
    """Branch sizes K_1, …, K_L with product C and the fewest weights, C·(S·K_1 + K_2 + … + K_L).

    The balance condition S·K_1 = K_2 = … = K_L = (S·C)^(1/L) seldom has whole solutions; these are
    the best whole ones (igcv2_igcv3, eq. 7-11).

    Args:
        channels: C.
        window: S, the number of taps of the first stage: 9 for 3×3, 1 for pointwise stages alone.
        stages: L.
    """
    channels = _checks.count("channels", channels)
    window = _checks.count("window", window)
    stages = _checks.count("stages", stages)
    best = min(
        (first for first in range(1, channels + 1) if channels % first == 0),
        key=lambda first: window * first + sum(_evenest(channels // first, stages - 1) or (2**62,)),
    )
    if stages == 1:
        return (channels,)
    return (best, *(_evenest(channels // best, stages - 1) or ()))


@cache
def _evenest(product: int, count: int) -> tuple[int, ...] | None:
    """``count`` ascending factors of ``product`` with the smallest sum, if there are any."""
    if count == 0:
        return () if product == 1 else None
    best: tuple[int, ...] | None = None
    for factor in range(1, product + 1):
        if product % factor == 0 and (rest := _evenest(product // factor, count - 1)) is not None:
            found = tuple(sorted((factor, *rest)))
            if best is None or sum(found) < sum(best):
                best = found
    return best


def compose(weights: Sequence[torch.Tensor], partitions: Sequence[Partition]) -> torch.Tensor:
    """Multiply the stages into the dense kernel ``[N, C, kh, kw]`` that they are together.

    At most one stage may have a window larger than 1×1, whose padding and stride are then those of
    the dense kernel. Weights come packed or, for even groups, as ``nn.Conv2d``'s. Differentiable.
    """
    if not partitions or len(weights) != len(partitions):
        raise ValueError(
            f"there are {len(weights)} weights and {len(partitions)} partitions; expected one of "
            "each for every stage, and at least one stage"
        )
    wide = [list(weight.shape[-2:]) for weight in weights if weight.shape[-2:] != (1, 1)]
    if len(wide) > 1:
        raise ValueError(f"the windows are {wide}; expected at most one larger than 1×1")
    first, *others = zip(weights, partitions, strict=True)
    kernel = first[1].unpack(first[0])
    for weight, partition in others:
        dense = partition.unpack(weight)
        kernel = torch.einsum("nmij,mckl->ncikjl", dense, kernel).flatten(4).flatten(2, 3)
    return kernel


# ---- how the branches are laid out -------------------------------------------------------------


def _branch_sizes(
    channels: int, branch_channels: int | Sequence[int] | None, stages: int | None
) -> tuple[int, ...]:
    if stages is not None:
        stages = _checks.count("stages", stages)
    if branch_channels is None:
        return balanced(channels, 1, stages or 2)
    if isinstance(branch_channels, int):
        size = _checks.count("branch_channels", branch_channels)
        if stages is None:
            stages = 1
            while size > 1 and size**stages < channels:
                stages += 1
        sizes = (size,) * stages
    else:
        sizes = tuple(_checks.count("branch_channels", size) for size in branch_channels)
        if stages not in (None, len(sizes)) or not sizes:
            raise ValueError(
                f"branch_channels has {len(sizes)} entries and stages is {stages}; expected one "
                "for each of at least one stage"
            )
    for size in sizes:
        if channels % size:
            raise ValueError(
                f"branch_channels = {size} does not divide in_channels = {channels}; expected a "
                "divisor, so that all branches of a stage are equal"
            )
    return sizes


@cache  # a network has the same widths in many places
def _branches(in_channels: int, out_channels: int, sizes: tuple[int, ...]) -> tuple[Partition, ...]:
    """Partitions whose branches meet channels that no branch before has brought together.

    A branch of stage l has channels t apart, t = K_1 · … · K_{l-1}: read as a number with digits of
    radix K_1, K_2, …, the channels of a branch differ in digit l alone. Where that is not possible
    because K_1 · … · K_l does not divide C, t is what connects most pairs of channels.
    """
    partitions: list[Partition] = []
    stride = 1
    for stage, size in enumerate(sizes):
        branches = in_channels // size
        if in_channels % (stride * size):
            stride = _most_connecting(partitions, in_channels, size)
        written = out_channels if stage == len(sizes) - 1 else in_channels
        if written % branches:
            raise ValueError(
                f"out_channels = {written} is no multiple of the {branches} branches that "
                f"branch_channels = {size} makes of {in_channels} channels"
            )
        partitions.append(
            Partition(
                in_channels,
                written,
                _spread(in_channels, stride, size),
                _spread(written, stride, written // branches),
            )
        )
        stride *= size
    return tuple(partitions)


def _most_connecting(before: Sequence[Partition], channels: int, size: int) -> int:
    """How far apart the channels of a stage's branches best stand after the stages ``before``."""
    reached = torch.eye(channels, device="cpu")
    for partition in before:
        reached = (partition.mask(torch.float32, "cpu") @ reached).clamp(max=1)

    def connected(stride: int) -> float:
        branches = torch.tensor(_spread(channels, stride, size), device="cpu")
        return float(reached[branches].sum(1).clamp(max=1).sum())

    return max(
        (t for t in range(1, channels // size + 1) if channels % (t * size) == 0), key=connected
    )


def _spread(channels: int, stride: int, size: int) -> list[range]:
    """Lists of ``size`` channels ``stride`` apart that cover all of them."""
    span = stride * size
    return [
        range(start + offset, start + span, stride)
        for start in range(0, channels, span)
        for offset in range(stride)
    ]


def _refuse_groups(groups: int, instead: str) -> None:
    if groups != 1:
        raise ValueError(f"groups is {groups}; expected 1: pass {instead}")


def _reset_bias(bias: nn.Parameter | None, weight: torch.Tensor) -> None:
    if bias is not None:
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(bias, -bound, bound)
