"""FLGC, fully learnable group convolution: every channel and every filter learns its group.

    Y = (W ⊙ M) * X,   M = T Sᵀ                                              (eq. 14)
    S = one-hot(argmax S̄) [C, G],   T = one-hot(argmax T̄) [N, G]            (eq. 9 to 12)

Forward and the gradient of the input are those of a group convolution in the groups of now. With
D = ∂L/∂(W ⊙ M) the weight learns from D itself, also where M is zero (eq. 16), and the logits S̄,
T̄ from D ⊙ W through the softmax Jacobian of every entry of their row (eq. 17, 18). Only D is dense,
and only while the structure learns: see :mod:`groupconv_ext.masked`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once

from .._checks import count
from ..learned import GRADIENTS, WEIGHT_GRADIENTS, check_option, flgc_conv2d, flgc_partition
from ..partition import Partition
from ..window import IntOrPair, Padding
from ._dense import DenselyTrained

__all__ = ["FLGConv1d", "FLGConv2d"]


class _FLGConv(DenselyTrained):
    input_logits: nn.Parameter
    output_logits: nn.Parameter
    _start_from: Partition | None

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
        partition: Partition | None = None,
        gradient: str = "straight_through",
        weight_gradient: str = "straight_through",
        update_every: int = 1,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv``'s arguments in its order, then the method's own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: See ``in_channels``.
            stride: See ``in_channels``.
            padding: See ``in_channels``.
            dilation: See ``in_channels``.
            groups: G, any number of groups; some may be empty, and there may be more than channels.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            partition: Groups to start from; default: logits from N(0, 1).
            gradient: ``"straight_through"``: through the softmax of every entry; ``"winner"``:
                of the winning entry alone, after which assignments hardly ever change.
            weight_gradient: ``"straight_through"``: weights learn also where the mask is zero;
                ``"masked"``: where it is one.
            update_every: Let the structure learn in every r-th training step only (counted by
                forward passes); between them a step costs what it costs when frozen.
            backend: ``"auto"``, ``"native"`` or ``"dense"``, see :mod:`groupconv_ext.learned`.
        """
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias,
            padding_mode,
            device,
            dtype,
            backend,
        )
        check_option("gradient", gradient, GRADIENTS)
        check_option("weight_gradient", weight_gradient, WEIGHT_GRADIENTS)
        if partition is not None:
            _check_start(partition, in_channels, out_channels)
            if groups not in (1, partition.groups):
                raise ValueError(
                    f"groups = {groups} contradicts {partition}; pass only the partition"
                )
            groups = partition.groups
        self._start_from = partition
        self.groups = count("groups", groups)
        self.gradient = gradient
        self.weight_gradient = weight_gradient
        self.update_every = count("update_every", update_every)
        self.input_logits = nn.Parameter(
            torch.empty(in_channels, groups, device=device, dtype=dtype)
        )
        self.output_logits = nn.Parameter(
            torch.empty(out_channels, groups, device=device, dtype=dtype)
        )
        self.reset_parameters(partition)

    def reset_parameters(self, partition: Partition | None = None) -> None:
        """Weight as in ``nn.Conv(groups=G)``; logits from N(0, 1), or such that choose a partition.

        For a partition the largest of a row's random numbers changes places with the one that
        has to win.
        """
        self._start(self.in_channels / self.groups)
        with torch.no_grad():
            self.input_logits.normal_()
            self.output_logits.normal_()
            if partition is not None:
                _let_win(self.input_logits, partition.inputs)
                _let_win(self.output_logits, partition.outputs)

    def structure_parameters(self) -> list[nn.Parameter]:
        """The logits."""
        return [self.input_logits, self.output_logits]

    def _chosen(self) -> Partition:
        if self.input_logits.is_meta and self._start_from is not None:
            return self._start_from  # which the logits would choose if they had values
        return flgc_partition(self.input_logits, self.output_logits, self._name())

    def _convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
    ) -> torch.Tensor:
        return flgc_conv2d(
            x,
            weight,
            self.bias,
            self.input_logits,
            self.output_logits,
            stride=stride,
            padding=padding,
            dilation=dilation,
            gradient=self.gradient,
            weight_gradient=self.weight_gradient,
            learn=self.update_every == 1 or not self.training or self._learns_now(),
            backend=self.backend,
            owner=self._name(),
        )

    @_disable_dynamo
    def _learns_now(self) -> bool:
        # A counter in a compiled graph would be a constant of it, and every step another graph.
        if self._begins_step():
            self._steps += 1
        return (self._steps - 1) % self.update_every == 0

    def _description(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels}, groups={self.groups})"
        )

    def extra_repr(self) -> str:
        """The arguments, and whether the groups still change."""
        parts = [super().extra_repr(), f"groups={self.groups}"]
        for name in ("gradient", "weight_gradient"):
            if getattr(self, name) != "straight_through":
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.update_every != 1:
            parts.append(f"update_every={self.update_every}")
        return ", ".join(parts)


class FLGConv2d(_FLGConv):
    """``nn.Conv2d`` whose G groups are learned, channel by channel and filter by filter."""

    dimensions = 2

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Self:
        """A layer with the arguments and the weight of ``conv``; options as of the layer."""
        return cls._from_conv(conv, **options)


class FLGConv1d(_FLGConv):
    """``nn.Conv1d`` whose G groups are learned, channel by channel and filter by filter."""

    dimensions = 1

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, **options: Any) -> Self:
        """A layer with the arguments and the weight of ``conv``; options as of the layer."""
        return cls._from_conv(conv, **options)


def _check_start(partition: Partition, in_channels: int, out_channels: int) -> None:
    if not isinstance(partition, Partition):
        raise TypeError(f"partition is {partition!r}; expected a groupconv_ext.Partition")
    if (partition.in_channels, partition.out_channels) != (in_channels, out_channels):
        raise ValueError(
            f"in_channels, out_channels = {in_channels}, {out_channels}; expected those of "
            f"{partition}"
        )
    if sum(map(len, partition.inputs)) != in_channels or partition.has_overlap:
        raise ValueError(
            f"{partition} has input channels in no group or in several; expected every channel in "
            "exactly one, as a label says it"
        )


def _let_win(logits: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> None:
    label = torch.empty(logits.shape[0], 1, dtype=torch.int64)
    for group, channels in enumerate(groups):
        label[list(channels)] = group
    label = label.to(logits.device)
    largest, place = logits.max(1, keepdim=True)
    displaced = logits.gather(1, label)
    logits.scatter_(1, place, displaced).scatter_(1, label, largest)
