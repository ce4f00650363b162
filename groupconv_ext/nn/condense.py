"""CondenseNet's learned group convolution: a dense layer that forgets the inputs it needs least.

The N filters stand in G interleaved groups (output n in group n mod G, so that what follows reads
from all of them). At the start every group reads all C inputs. C_f − 1 condensing stages, evenly
spread over the first half of training, each take from every group g the C / C_f inputs of least

    Σ over the outputs n of g, and the window, of |W[n, c]|

so that C / C_f of them are left to each, chosen by each group for itself: the lists of inputs
overlap. A group lasso helps the weights of an input to become small together::

    λ · Σ_{g, c} √( Σ_{n in g} W[n, c]² )

The forward pass at any moment is the partitioned convolution of what is left; what a group has
dropped takes no part in it, gets no gradient and stays what it was.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from .. import _checks
from ..functional import conv2d
from ..partition import Partition
from ..prologue import Prologue
from ..window import IntOrPair, Padding
from ._learned import GroupedLayer
from ._windowed import ParameterFactory, Windowed, check_backend
from .partitioned import PartitionedConv2d, dense_layer, packed_layer

__all__ = ["CondenseConv2d"]


class CondenseConv2d(Windowed, GroupedLayer):
    """A dense convolution that condenses into groups with inputs of their own choice.

    Call :meth:`condense` with the progress of training once an epoch or once a step.

    Attributes:
        weight: ``[N, C, kh, kw]``.
        bias: ``[N]`` or ``None``.
        kept: ``[G, C]``, true where a group still reads an input; on the CPU.
        stage: How many condensing stages are done, 0 … ``condense_factor`` − 1.
    """

    weight: nn.Parameter
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
        condense_factor: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order, then its own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: See ``in_channels``.
            stride: See ``in_channels``.
            padding: See ``in_channels``.
            dilation: See ``in_channels``.
            groups: G, of the outputs.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            condense_factor: C_f: a group keeps one in so many inputs. Default: ``groups``.
            backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.
        """
        super().__init__()
        in_channels = _checks.count("in_channels", in_channels)
        out_channels = _checks.count("out_channels", out_channels)
        groups = _checks.count("groups", groups)
        factor = groups if condense_factor is None else condense_factor
        factor = _checks.count("condense_factor", factor)
        if out_channels % groups:
            raise ValueError(f"groups = {groups} does not divide out_channels = {out_channels}")
        if in_channels % factor:
            raise ValueError(
                f"condense_factor = {factor} does not divide in_channels = {in_channels}; each "
                "stage drops in_channels / condense_factor inputs of every group"
            )
        check_backend(backend)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.condense_factor = factor
        self.backend = backend
        self._keep_arguments(kernel_size, stride, padding, dilation, padding_mode)
        self._keep(torch.ones(groups, in_channels, dtype=torch.bool, device="cpu"))
        new = ParameterFactory(device, dtype)
        self.weight = new(out_channels, in_channels, *self.kernel_size)
        self.register_parameter("bias", new(out_channels) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Self:
        """A layer with the arguments and the weight of ``conv``; options as of the layer."""
        layer: Self = dense_layer(cls, conv, **options)
        return layer

    def reset_parameters(self) -> None:
        """Start as ``nn.Conv2d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor, prologue: Prologue | None = None) -> torch.Tensor:
        """Convolve ``prologue(x)`` with what is left of the weight."""
        x, padding = self._padded(x)
        partition = self._current
        return conv2d(
            x,
            partition.pack(self.weight),
            self.bias,
            partition=partition,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            prologue=prologue,
            backend=self.backend,
        )

    # ---- condensing ---------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """How many condensing stages are done."""
        dropped = self.in_channels - int(self.kept[0].sum())
        return dropped * self.condense_factor // self.in_channels

    def condense(self, progress: float) -> None:
        """Do the condensing stages that are due.

        Args:
            progress: The part of the training that is over, from 0 to 1. Stage s of S =
                ``condense_factor`` − 1 is due at s / (2 S), all of them when half is over.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; expected the part that is over, 0 … 1")
        if self.frozen:
            return
        stages = self.condense_factor - 1
        due = min(stages, int(2 * progress * stages + 1e-9))
        while self.stage < due:
            self._drop()

    def _drop(self) -> None:
        count = self.in_channels // self.condense_factor
        importance = self._by_group(self.weight.detach().abs()).double().cpu()
        if not bool(importance.isfinite().all()):
            raise ValueError(
                f"{self._name()}.weight holds NaN or Inf; inputs cannot be compared by its size"
            )
        order = importance.masked_fill(~self.kept, torch.inf).argsort(dim=1, stable=True)
        self._keep(self.kept.scatter(1, order[:, :count], False))

    def _by_group(self, weight: torch.Tensor) -> torch.Tensor:
        """Sums ``[G, C]`` of a weight over the outputs of each group and the window."""
        by_input = weight.flatten(2).sum(2)
        return by_input.view(-1, self.groups, self.in_channels).sum(0)

    def _keep(self, kept: torch.Tensor) -> None:
        self.kept = kept
        everything = bool(kept.all())
        inputs = [row.nonzero().flatten().tolist() for row in kept]
        outputs = [range(g, self.out_channels, self.groups) for g in range(self.groups)]
        self._partition = Partition(self.in_channels, self.out_channels, inputs, outputs)
        # As long as all groups read everything they are one.
        dense = Partition.contiguous(self.in_channels, self.out_channels, 1)
        self._current = dense if everything else self._partition

    def group_lasso(self) -> torch.Tensor:
        """Σ √(Σ W²) over what every group still reads, to be added to the loss times λ.

        Zero once nothing is left to drop: then all weights may grow again.
        """
        if self.frozen or self.stage == self.condense_factor - 1:
            return self.weight.new_zeros(())
        squares = self._by_group(self.weight.square())
        kept = squares[self.kept.to(squares.device)]
        # At zero the root has no slope.
        return kept.clamp(min=torch.finfo(kept.dtype).tiny).sqrt().sum()

    # ---- as a GroupedLayer --------------------------------------------------------------------

    def _description(self) -> str:
        return f"CondenseConv2d({self.in_channels}, {self.out_channels}, groups={self.groups})"

    def partition(self) -> Partition:
        """The inputs each group has left and the outputs it writes."""
        return self._partition

    def deployed(self) -> PartitionedConv2d:
        """The same function with a packed weight of what is left."""
        return packed_layer(
            PartitionedConv2d, self, self._partition, self.weight, backend=self.backend
        )

    def get_extra_state(self) -> torch.Tensor:
        """Whether the structure is frozen, then what is kept."""
        return torch.cat((torch.tensor([self.frozen]), self.kept.flatten()))

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Go on where the layer of the checkpoint was."""
        if state.dtype != torch.bool or state.shape != (1 + self.kept.numel(),):
            raise ValueError(
                f"{self._name()}: the checkpoint has a state of {state.dtype} with shape "
                f"{list(state.shape)}; expected torch.bool with {1 + self.kept.numel()} entries "
                f"for {self.groups} groups of {self.in_channels} inputs"
            )
        self._resume(bool(state[0]))
        self._keep(state[1:].view_as(self.kept).cpu().clone())

    def extra_repr(self) -> str:
        """The arguments, and how far it is."""
        parts = [f"{self.in_channels}, {self.out_channels}", f"groups={self.groups}"]
        parts.append(f"stage={self.stage} of {self.condense_factor - 1}")
        return self._describe(*parts)
