"""Every operation again in slow, obvious PyTorch: the oracle of the tests, and a fallback.

For an image x, a Partition with groups g, and packed weight blocks W_g::

    y[outputs_g] = act( W_g * pad(x[inputs_g]) + bias[outputs_g] + residual[outputs_g] )

with * the usual cross-correlation, strided and dilated. One loop over the groups, nothing clever:
what can be read off the formula cannot be wrong in the same way as a kernel. Any floating dtype
and device; plain autograd differentiates everything here, the two gradients included.

Shapes: x ``[B, C, H, W]``, packed weight ``[entries, kh, kw]``, bias ``[N]``, residual like y
``[B, N, H', W']``. ``padding`` is ``(top, bottom, left, right)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from .partition import Partition, kronecker_radices

__all__ = [
    "activations",
    "chain",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "dgconv_weight",
    "flgc_weight",
    "output_size",
    "prologue",
    "quantized_conv2d",
    "sound_conv2d",
]

Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = tuple[int, int, int, int]

activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}
"""Every activation by its name; the position is the code that the native operations take."""


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    partition: Partition,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The partitioned convolution with its epilogue, ``act(conv(x) + bias + residual)``."""
    batch, channels, *input_size = x.shape
    if channels != partition.in_channels:
        raise ValueError(f"x has {channels} channels; expected {partition.in_channels}")
    out_size = output_size(input_size, weight.shape[1:], stride, padding, dilation)
    padded = _pad(x, padding)
    results = []
    for inputs, outputs, block in _groups(partition, weight):
        if inputs.numel() and outputs.numel():
            results.append(
                sound_conv2d(padded.index_select(1, inputs), block, None, stride, (0, 0), dilation)
            )
        else:
            results.append(x.new_zeros(batch, outputs.numel(), *out_size))
    # Every output channel stands in exactly one result, so sorting by channel is all that is left.
    y = torch.cat(results, 1).index_select(1, _order(partition.outputs, x.device))
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual
    return _activation(activation)(y)


def sound_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
) -> torch.Tensor:
    """``F.conv2d``, in float32 where PyTorch's own narrow kernels are wrong.

    On a CPU with AMX, PyTorch 2.13 crashes in dilated convolutions of float16 and bfloat16 whose
    maps are a few pixels wide, and reads past its memory in strided ones of bfloat16.
    """
    plain = stride == dilation == (1, 1)
    if plain or not x.is_cpu or x.dtype not in (torch.float16, torch.bfloat16):
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):  # which would make them narrow again
        bias = None if bias is None else bias.float()
        y = functional.conv2d(x.float(), weight.float(), bias, stride, padding, dilation, groups)
        return y.to(x.dtype)


def chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    partitions: Sequence[Partition],
    activation: str | None = None,
) -> torch.Tensor:
    """Pointwise convolutions one after another, ``act(W_S … W_1 x + bias)``."""
    for weight, partition in zip(weights, partitions, strict=True):
        x = conv2d(x, weight, None, partition)
    if bias is not None:
        x = x + bias[:, None, None]
    return _activation(activation)(x)


def prologue(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """What a prologue makes of x, ``act(x · scale[c] + shift[c])``; rounded once."""
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if scale is not None:
        x = x * scale.to(x.dtype)[:, None, None]
    if shift is not None:
        x = x + shift.to(x.dtype)[:, None, None]
    return _activation(activation)(x).to(dtype)


def quantized_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    step: torch.Tensor,
    partition: Partition,
    zero_point: int,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    activation: str | None = None,
    output: tuple[float, int] | None = None,
) -> torch.Tensor:
    """A convolution of uint8 ``x`` and int8 ``weight``, the totals exact in float64.

    ``y = act(step[n] · (bias[n] + Σ weight · (x − zero_point)))`` with an int32 bias and a float32
    step, as float32 or, with an ``output`` scale and zero point, as uint8. Where the activation
    bends is rounded to a whole number of output steps.
    """
    shifted = x.double() - zero_point  # below 2⁵³ every sum is exact
    total = conv2d(shifted, weight.double(), bias.double(), partition, stride, padding, dilation)
    scale, moved = (1.0, 0) if output is None else output
    value = total.float() * (step.double() / scale).float()[:, None, None]
    low, high = (-moved, 255 - moved) if output is not None else (-math.inf, math.inf)
    if activation in ("relu", "relu6"):
        low = max(low, 0)
    if activation == "relu6":
        high = min(high, 6.0 if output is None else round(6 / scale))
    value = value.clamp(low, high)
    return value if output is None else (value.round() + moved).to(torch.uint8)


def conv2d_input_grad(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    partition: Partition,
    input_size: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
) -> torch.Tensor:
    """∂L/∂x for x of height and width ``input_size``, from ∂L/∂y of the bare convolution.

    Each group's transposed convolution is added to the channels it reads; channels that several
    groups read collect all of them, and channels that none reads stay zero.
    """
    grad_output = grad_output.contiguous()
    top, bottom, left, right = padding
    height, width = input_size
    batch = grad_output.shape[0]
    padded_size = (height + top + bottom, width + left + right)
    grad = grad_output.new_zeros(batch, partition.in_channels, *padded_size)
    channels, grads = [_index([], grad.device)], [grad[:, :0]]
    for inputs, outputs, block in _groups(partition, weight):
        if inputs.numel() and outputs.numel():
            read_shape = (batch, inputs.numel(), *padded_size)
            written = grad_output.index_select(1, outputs)
            channels.append(inputs)
            grads.append(conv2d_input(read_shape, block, written, stride, 0, dilation))  # type: ignore[no-untyped-call]
    grad = grad.index_add(1, torch.cat(channels), torch.cat(grads, 1))
    return grad[:, :, top : top + height, left : left + width]


def conv2d_weight_grad(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    partition: Partition,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
) -> torch.Tensor:
    """∂L/∂weight, packed, from ∂L/∂y of the bare convolution."""
    padded, grad_output = _pad(x, padding), grad_output.contiguous()
    grads = [x.new_zeros(0, *kernel_size)]
    for inputs, outputs in _index_pairs(partition, x.device):
        if inputs.numel() and outputs.numel():
            block_shape = (outputs.numel(), inputs.numel(), *kernel_size)
            read, written = padded.index_select(1, inputs), grad_output.index_select(1, outputs)
            block = conv2d_weight(read, block_shape, written, stride, 0, dilation)  # type: ignore[no-untyped-call]
            grads.append(block.flatten(0, 1))
    return torch.cat(grads)


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> Pair:
    """Height and width of the output; an error where the kernel exceeds the padded input."""
    top, bottom, left, right = padding
    padded = (input_size[0] + top + bottom, input_size[1] + left + right)
    spans = (dilation[0] * (kernel_size[0] - 1) + 1, dilation[1] * (kernel_size[1] - 1) + 1)
    if spans[0] > padded[0] or spans[1] > padded[1]:
        raise ValueError(
            f"the kernel spans {spans[0]}×{spans[1]} pixels but the padded input has only "
            f"{padded[0]}×{padded[1]}"
        )
    return (padded[0] - spans[0]) // stride[0] + 1, (padded[1] - spans[1]) // stride[1] + 1


def _activation(name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if (name or "none") not in activations:
        raise ValueError(f"activation is {name!r}; expected None or one of {list(activations)}")
    return activations[name or "none"]


def _pad(x: torch.Tensor, padding: Padding) -> torch.Tensor:
    # Contiguous, because index_select takes its time otherwise, and PyTorch's weight gradient of a
    # strided 1×1 convolution corrupts memory on channels_last inputs with channel counts off the
    # vector width (seen in 2.13 and 2.15).
    top, bottom, left, right = padding
    return functional.pad(x, (left, right, top, bottom)).contiguous()


def _index_pairs(
    partition: Partition, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for inputs, outputs in zip(partition.inputs, partition.outputs, strict=True):
        yield _index(inputs, device), _index(outputs, device)


def _groups(
    partition: Partition, weight: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every group's inputs, outputs, and block ``[outputs, inputs, kh, kw]`` of the weight."""
    if weight.shape[0] != partition.entries:
        raise ValueError(
            f"weight has {weight.shape[0]} entries; expected {partition.entries} for {partition}"
        )
    blocks = torch.split(weight, [outs * ins for outs, ins in partition.sizes])
    pairs = _index_pairs(partition, weight.device)
    for (inputs, outputs), block in zip(pairs, blocks, strict=True):
        yield inputs, outputs, block.view(outputs.numel(), inputs.numel(), *weight.shape[1:])


def _order(lists: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Where each channel stands in the concatenated lists."""
    return _index([channel for group in lists for channel in group], device).argsort()


def _index(channels: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.int64, device=device)


# ---- masked weights -----------------------------------------------------------------------------


def flgc_weight(
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    gradient: str = "straight_through",
    weight_gradient: str = "straight_through",
) -> torch.Tensor:
    """``W ⊙ (T Sᵀ)`` (FLGC eq. 14), with the gradients of eq. 16 to 18.

    The value is that of the hard assignments, the derivative that of the softmax; with
    ``gradient="winner"`` only of the entry that won. ``weight_gradient="straight_through"`` lets
    the weight see the gradient of the product everywhere, ``"masked"`` where the mask is one.
    """
    mask = _assignments(output_logits, gradient) @ _assignments(input_logits, gradient).T
    mask = mask.to(weight.dtype).reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))
    if weight_gradient == "masked":
        return weight * mask
    return weight.detach() * mask + (weight - weight.detach())


def _assignments(logits: torch.Tensor, gradient: str) -> torch.Tensor:
    soft = logits.softmax(1)
    hard = functional.one_hot(logits.argmax(1), logits.shape[1]).to(soft.dtype)
    learned = soft - soft.detach()
    return hard + (hard * learned if gradient == "winner" else learned)


def dgconv_weight(weight: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """``W ⊙ U`` (DGConv eq. 3 and 4): U a Kronecker product of ones and identities.

    A gate is one where its parameter is not negative, and passes its gradient on unchanged.
    """
    outs, ins = weight.shape[:2]
    radices = kronecker_radices(ins, outs)
    bits = (gates >= 0).to(gates.dtype) + (gates - gates.detach())
    mask = gates.new_ones(1, 1)
    for gate, radix in zip(bits, radices, strict=True):
        ones, identity = gates.new_ones(radix, radix), torch.eye(radix, device=gates.device)
        mask = torch.kron(mask, gate * ones + (1 - gate) * identity.to(gates.dtype))
    common = mask.shape[0]
    mask = torch.kron(mask, gates.new_ones(outs // common, ins // common))
    return weight * mask.to(weight.dtype).reshape(outs, ins, *(1,) * (weight.dim() - 2))
