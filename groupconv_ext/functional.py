"""The partitioned convolution as a function: what layers and users call.

    y[outputs_g] = activation( W_g * x[inputs_g] + bias[outputs_g] + residual[outputs_g] )

for every group g of a :class:`~groupconv_ext.Partition`, and with a
:class:`~groupconv_ext.Prologue` x' = relu(x · scale + shift) in the place of x. Everything that
``F.conv2d`` accepts is accepted, everything wrong is refused here, before any kernel sees it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NoReturn

import torch
from torch import is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ._ops import bare_conv2d
from .autograd import ACTIVATIONS, wants_grad
from .backends import NATIVE, Backend, Call, best, choice, choose
from .operations import settled
from .partition import Partition
from .prologue import PROLOGUE_ACTIVATIONS, Prologue
from .window import IntOrPair, Padding, Window, is_plain, make_window

__all__ = ["conv1d", "conv2d", "packed_weight"]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    partition: Partition,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    prologue: Prologue | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolve ``x`` in the groups of ``partition``.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``, any strides; the output keeps its memory format.
        weight: Packed, ``[partition.entries, kh, kw]``; for even groups also
            ``[N, C / groups, kh, kw]``, the weight of ``nn.Conv2d(groups=G)`` as it is.
        bias: ``[N]``.
        partition: Which inputs each group reads and which outputs it writes.
        stride: As in ``F.conv2d``, and so are ``padding`` (a number, a pair, ``"same"`` or
            ``"valid"``) and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        activation: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or ``None``; applied last.
        residual: Added before the activation; the shape of the output.
        prologue: What is done to ``x`` first, channel by channel; padding comes after it.
        backend: ``"auto"`` or a name of :func:`groupconv_ext.backends.names`.

    Raises:
        TypeError: An argument or a dtype of the wrong kind.
        ValueError: A value that does not fit the partition or the window.
        groupconv_ext.backends.BackendError: A backend asked for by name that cannot run.
    """
    kind: tuple[Hashable, ...] | None = None
    plain = prologue is None and not is_compiling()
    if plain and (
        type(stride) is type(padding) is type(dilation) is int  # the usual case costs little
        or (is_plain(stride) and is_plain(padding) and is_plain(dilation))
    ):
        try:
            # All that the checks below look at and the operation does not: where that was found
            # right before, the operation, or its Function, is all that is left to do.
            kind = (
                weight.shape,
                x.dtype,
                x.dim(),
                x.is_cpu,
                stride,
                padding,
                dilation,
                activation,
                backend,
                forward_ad._current_level,
                is_autocast_enabled("cpu"),
                choice.measured_devices,
            )
            earlier = partition.settled_calls.get(kind)
            if earlier is not None:
                settings, numbers = earlier
                if not wants_grad(x, weight, bias, residual):
                    return bare_conv2d(x, weight, bias, residual, *numbers)
                packed = weight if weight.dim() == 3 else weight.flatten(0, 1)
                return NATIVE.convolve(x, packed, bias, residual, *settings)
        except (AttributeError, RuntimeError, TypeError):
            kind = None  # What is wrong is found again, and said in the same words as everywhere.
    _check_tensors(x, weight, bias, residual)
    if prologue is not None:
        _check_prologue(prologue)
    rank = x.dim()
    if rank == 3:
        y = conv2d(
            x.unsqueeze(0),
            weight,
            bias,
            partition=partition,
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
            residual=None if residual is None else residual.unsqueeze(0),
            prologue=prologue,
            backend=backend,
        )
        return y.squeeze(0)
    if rank != 4:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, H, W] or [C, H, W]")
    if not isinstance(partition, Partition):
        raise TypeError(f"partition is {partition!r}; expected a groupconv_ext.Partition")
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and is_autocast_enabled(device):
        kind = None  # what is convolved is not what was given
        x, weight, bias, residual = _autocast(x, weight, bias, residual)
        prologue = None if prologue is None else _autocast_prologue(prologue, x)
    weight = packed_weight(weight, partition)
    window = make_window(weight.shape[1], weight.shape[2], stride, padding, dilation)
    if activation is None:
        activation = "none"
    elif activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected None or one of {ACTIVATIONS}")
    needs_grad = is_grad_enabled() and wants_grad(x, weight, bias, residual)
    if prologue is not None:
        needs_grad = needs_grad or wants_grad(prologue.scale, prologue.shift)
    in_forward_mode = forward_ad._current_level >= 0
    call = (device, x.dtype, needs_grad, in_forward_mode, prologue is not None)
    by_operands = backend == "auto" and device in choice.measured_devices
    chosen = None if is_compiling() or by_operands else _choices.get((backend, call))
    if by_operands:
        operands = (x, weight, bias, residual, partition, window, activation, prologue)
        _check_operands(x, weight, bias, residual, partition, window, prologue)
        return best(Call(*call), operands).convolve(*operands)
    if chosen is None:
        chosen = choose(backend, Call(*call))
        if not is_compiling():
            _choices[backend, call] = chosen
    if kind is not None and chosen is NATIVE and device == "cpu" and not in_forward_mode:
        settings = partition, window, activation
        partition.settled_calls.add(kind, (settings, settled(*settings)))
    if chosen.checks_operands and not is_compiling():
        # Looking at every operand from Python takes as long as a small convolution, so only a call
        # that was refused is looked at again: to say why in the same words as everywhere.
        try:
            return chosen.convolve(
                x, weight, bias, residual, partition, window, activation, prologue
            )
        except RuntimeError as error:
            refusal = error
        # Out here, the user sees one error and not two.
        _check_operands(x, weight, bias, residual, partition, window, prologue)
        raise refusal
    _check_operands(x, weight, bias, residual, partition, window, prologue)
    return chosen.convolve(x, weight, bias, residual, partition, window, activation, prologue)


_choices: dict[tuple[str, tuple[str, torch.dtype, bool, bool, bool]], Backend] = {}
"""What was chosen before; the answer depends on nothing else."""


def conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    partition: Partition,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    prologue: Prologue | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`conv2d` over sequences ``[B, C, L]`` or ``[C, L]``, with a weight ``[entries, k]``.

    For even groups the weight of ``nn.Conv1d(groups=G)``, ``[N, C / groups, k]``, is taken as well.
    """
    _check_tensors(x, weight, bias, residual)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, L] or [C, L]")
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"weight has shape {list(weight.shape)}; expected [entries, k] or [N, C / groups, k]"
        )
    y = conv2d(
        x.unsqueeze(-2),
        weight.unsqueeze(-2),
        bias,
        partition=partition,
        stride=(1, _single("stride", stride)),
        padding=padding if isinstance(padding, str) else (0, _single("padding", padding)),
        dilation=(1, _single("dilation", dilation)),
        activation=activation,
        residual=None if residual is None else residual.unsqueeze(-2),
        prologue=prologue,
        backend=backend,
    )
    return y.squeeze(-2)


def _single(name: str, value: IntOrPair) -> int:
    if not isinstance(value, Sequence):
        return value
    if isinstance(value, str) or len(value) != 1:
        raise TypeError(f"{name} is {value!r}; expected an int")
    return value[0]


def _check_tensors(x: object, weight: object, bias: object, residual: object) -> None:
    tensor, maybe = torch.Tensor, (torch.Tensor, type(None))
    if not isinstance(x, tensor):
        raise TypeError(f"x is {x!r}; expected a tensor")
    if not isinstance(weight, tensor):
        raise TypeError(f"weight is {weight!r}; expected a tensor")
    if not isinstance(bias, maybe):
        raise TypeError(f"bias is {bias!r}; expected a tensor or None")
    if not isinstance(residual, maybe):
        raise TypeError(f"residual is {residual!r}; expected a tensor or None")


def _check_prologue(prologue: object) -> None:
    if not isinstance(prologue, Prologue):
        raise TypeError(f"prologue is {prologue!r}; expected a groupconv_ext.Prologue")
    for name, tensor in (("scale", prologue.scale), ("shift", prologue.shift)):
        if not isinstance(tensor, (torch.Tensor, type(None))):
            raise TypeError(f"prologue.{name} is {tensor!r}; expected a tensor or None")
    if prologue.activation not in PROLOGUE_ACTIVATIONS:
        raise ValueError(
            f"prologue.activation is {prologue.activation!r}; expected one of "
            f"{PROLOGUE_ACTIVATIONS}"
        )


def packed_weight(weight: torch.Tensor, partition: Partition) -> torch.Tensor:
    """The weight as ``[entries, kh, kw]``."""
    _, ins = partition.sizes[0]
    if weight.dim() == 4 and partition.is_even:
        if weight.shape[0] == partition.out_channels and weight.shape[1] == ins:
            return weight.flatten(0, 1)
    elif weight.dim() == 3 and weight.shape[0] == partition.entries:
        return weight
    also = f" or [{partition.out_channels}, {ins}, kh, kw]" if partition.is_even else ""
    raise ValueError(
        f"weight has shape {list(weight.shape)}; expected [{partition.entries}, kh, kw]{also} "
        f"for {partition}"
    )


def _check_operands(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    partition: Partition,
    window: Window,
    prologue: Prologue | None,
) -> None:
    batch, channels, height, width = x.shape
    if channels != partition.in_channels:
        raise ValueError(
            f"x has {channels} channels; expected {partition.in_channels} for {partition}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point dtype")
    if weight.dtype != x.dtype or weight.device != x.device:
        _refuse_mix("weight", weight, x)
    if bias is not None:
        _check_like("bias", bias, x, (partition.out_channels,))
    out_size = window.output_size(height, width, weight.shape[1], weight.shape[2])
    if residual is not None:
        _check_like("residual", residual, x, (batch, partition.out_channels, *out_size))
    if prologue is not None:
        for name, tensor in (("scale", prologue.scale), ("shift", prologue.shift)):
            if tensor is not None:
                # A normalisation's numbers may stay in float32 where x is narrower.
                narrow = x.dtype in (torch.float16, torch.bfloat16)
                also = torch.float32 if narrow else None
                _check_like(f"prologue.{name}", tensor, x, (channels,), also)


def _check_like(
    name: str,
    tensor: torch.Tensor,
    x: torch.Tensor,
    shape: tuple[int, ...],
    also: torch.dtype | None = None,
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    if tensor.dtype not in (x.dtype, also) or tensor.device != x.device:
        _refuse_mix(name, tensor, x)


def _refuse_mix(name: str, tensor: torch.Tensor, x: torch.Tensor) -> NoReturn:
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype} and x is {x.dtype}; convert one, or use torch.autocast"
        )
    raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}; move one of them")


def _autocast(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As ``F.conv2d`` under autocast: everything in the lower precision, float64 left alone."""
    if x.dtype == torch.float64:
        return x, weight, bias, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    return (
        x.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if residual is None else residual.to(dtype),
    )


def _autocast_prologue(prologue: Prologue, x: torch.Tensor) -> Prologue:
    """As a normalisation under autocast: x in the lower precision, its parameters in float32."""
    if x.dtype == torch.float64:
        return prologue
    scale, shift, activation = prologue
    return Prologue(
        None if scale is None else scale.float(),
        None if shift is None else shift.float(),
        activation,
    )
