"""DGConv, dynamic grouping convolution: log₂ C gates choose among the Kronecker products.

    Y = (W ⊙ U) * X                                                          (eq. 3)
    U = U₁ ⊗ … ⊗ U_K,   U_k = g_k · 1 + (1 − g_k) · I,   g = [g̃ ≥ 0]         (eq. 4)

One gate for every prime factor p_k of gcd(C, N), U_k is p_k × p_k, the first with the largest
stride; what remains of the channels is a block of ones. Powers of two with C = N are the paper's
case. A gate passes its gradient on to g̃ unchanged.

A layer with ζ = ‖U‖₀ = (C N / gcd²) · Π p_k (1 + (p_k − 1) g_k) connections costs less the fewer
gates are open; :class:`ResourceConstraint` says by how much they may be (eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from .._checks import gates as checked_gates
from ..learned import dgconv_conv2d, dgconv_partition
from ..partition import Partition, kronecker_radices
from ..window import IntOrPair, Padding
from ._dense import DenselyTrained

__all__ = ["DGConv2d", "ResourceConstraint"]


class DGConv2d(DenselyTrained):
    """``nn.Conv2d`` whose number of groups, and which channels they join, is learned.

    Attributes:
        radices: The factor p_k of every gate.
        gate_history: ``(step, gates)`` of every training step after which the gates were others
            than before, the first included.
    """

    dimensions = 2
    gates: nn.Parameter
    _start_from: Sequence[int] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gates: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        """Take ``nn.Conv2d``'s arguments in its order, but ``groups``, then the method's own.

        Args:
            in_channels: As in ``nn.Conv2d``, like everything up to ``dtype``.
            out_channels: See ``in_channels``.
            kernel_size: See ``in_channels``.
            stride: See ``in_channels``.
            padding: See ``in_channels``.
            dilation: See ``in_channels``.
            bias: See ``in_channels``.
            padding_mode: See ``in_channels``.
            device: See ``in_channels``.
            dtype: See ``in_channels``.
            gates: 0 or 1 for every prime factor of gcd(in_channels, out_channels) to start from,
                as in :meth:`Partition.kronecker`; default: at random.
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
        self.radices = kronecker_radices(in_channels, out_channels)
        self._start_from = gates
        self.gates = nn.Parameter(torch.empty(len(self.radices), device=device, dtype=dtype))
        self.gate_history: list[tuple[int, tuple[int, ...]]] = []
        self.reset_parameters(gates)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Self:
        """A layer with the arguments and the weight of ``conv``; options as of the layer."""
        return cls._from_conv(conv, **options)

    def reset_parameters(self, gates: Sequence[int] | None = None) -> None:
        """Gates ±1e-8, at random or as given; weight as in ``nn.Conv2d`` with as many groups."""
        if gates is None:
            open_gates = torch.randint(0, 2, (len(self.radices),), device="cpu")
        else:
            chosen = checked_gates(gates, self.radices)
            open_gates = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        with torch.no_grad():
            self.gates.copy_(open_gates.to(torch.float64) * 2e-8 - 1e-8)
        groups = math.prod(
            radix for radix, gate in zip(self.radices, open_gates.tolist(), strict=True) if not gate
        )
        self._start(self.in_channels / groups)

    def structure_parameters(self) -> list[nn.Parameter]:
        """The gates."""
        return [self.gates]

    def _chosen(self) -> Partition:
        if self.gates.is_meta and self._start_from is not None:  # there are no values to look at
            return Partition.kronecker(self._start_from, self.in_channels, self.out_channels)
        return dgconv_partition(self.gates, self.in_channels, self.out_channels, self._name())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``x`` in the groups of now."""
        if not torch.compiler.is_compiling() and self._begins_step():
            self.record_gates()
        return super().forward(x)

    def _convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: IntOrPair,
        padding: Padding,
        dilation: IntOrPair,
    ) -> torch.Tensor:
        return dgconv_conv2d(
            x,
            weight,
            self.bias,
            self.gates,
            stride=stride,
            padding=padding,
            dilation=dilation,
            backend=self.backend,
            owner=self._name(),
        )

    def record_gates(self) -> None:
        """Count a training step and write the gates into the history where they have changed.

        The forward pass of a training step does it. Under ``torch.compile``, where it would cut
        the graph in two, call it yourself once a step.
        """
        if self.gates.is_meta or _are_many(self.gates):
            return
        gates = tuple(int(gate >= 0) for gate in self.gates.detach().tolist())
        if not self.gate_history or self.gate_history[-1][1] != gates:
            self.gate_history.append((self._steps, gates))
        self._steps += 1

    def get_extra_state(self) -> torch.Tensor:
        """Whether the structure is frozen, the step, and then the history of the gates."""
        history = [(step, *gates) for step, gates in self.gate_history]
        rows = torch.tensor(history, dtype=torch.int64, device="cpu").flatten()
        return torch.cat((super().get_extra_state(), rows))

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Go on where the layer of the checkpoint was."""
        super().set_extra_state(state)
        width = 1 + len(self.radices)
        if (len(state) - 2) % width:
            raise ValueError(
                f"{self._name()}: the checkpoint's history has {len(state) - 2} numbers; expected "
                f"{width} for every change, the step and {width - 1} gates"
            )
        self.gate_history = [(row[0], tuple(row[1:])) for row in state[2:].view(-1, width).tolist()]

    def connections(self) -> torch.Tensor:
        """ζ, the ones in U, differentiable through the gates (straight-through)."""
        bits = (self.gates >= 0).to(self.gates.dtype) + (self.gates - self.gates.detach())
        common = math.gcd(self.in_channels, self.out_channels)
        radices = torch.tensor(self.radices, dtype=bits.dtype, device=bits.device)
        per_row = (1 + (radices - 1) * bits).prod()
        return self.out_channels * (self.in_channels // common) * per_row


def _are_many(gates: torch.Tensor) -> bool:
    """Whether these are the gates of an ensemble under ``torch.func.vmap``: no one layer's."""
    while torch._C._functorch.is_functorch_wrapped_tensor(gates):
        if torch._C._functorch.is_batchedtensor(gates):
            return True
        gates = torch._C._functorch.get_unwrapped(gates)
    return False


class ResourceConstraint:
    """DGConv's budget of connections, multiplied into the loss (eq. 8).

        loss · (o / ζ)^a,   a = 0 where ζ ≤ o, else −0.02

    with ζ the sum of all layers' connections and o = Σ C N / b.

    Attributes:
        budget: o.
    """

    budget: float

    def __init__(self, model: nn.Module, b: float = 32, exponent: float = -0.02) -> None:
        """Watch every :class:`DGConv2d` of ``model``.

        Args:
            model: Holds at least one DGConv2d.
            b: How many times fewer connections than a dense layer has; the paper's 16, 32, 64.
            exponent: a, of a network beyond its budget.
        """
        self._layers = [layer for layer in model.modules() if isinstance(layer, DGConv2d)]
        if not self._layers:
            raise ValueError("the model has no DGConv2d; expected at least one to constrain")
        if not (b > 0 and math.isfinite(b)):
            raise ValueError(f"b is {b}; expected a positive number")
        if not (exponent <= 0 and math.isfinite(exponent)):
            raise ValueError(f"exponent is {exponent}; expected a number that is not positive")
        self.exponent = exponent
        self.budget = sum(layer.in_channels * layer.out_channels for layer in self._layers) / b

    def connections(self) -> torch.Tensor:
        """ζ, differentiable through the gates."""
        return torch.stack([layer.connections().float() for layer in self._layers]).sum()

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, larger where the network has more connections than its budget."""
        ratio = self.connections() / self.budget
        # Where the budget holds the factor is one, and so is its gradient's absence.
        factor = torch.where(
            ratio > 1, ratio.clamp(min=1) ** -self.exponent, torch.ones_like(ratio)
        )
        return loss * factor.to(loss.device)
