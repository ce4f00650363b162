"""The native library: loads it, and teaches torch what its operations do without running them.

After import, ``torch.ops.groupconv`` has the operations, each with a fake kernel (shapes and
strides, for ``torch.compile`` and ``torch.export``) and a batching rule (for ``torch.vmap``).
Where the library is missing or cannot be loaded the package works without it, through the other
backends, and ``unavailable`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_compiling

from .window import Window

__all__ = [
    "LIBRARY",
    "chain",
    "chain_grad",
    "compute_dtype",
    "conv2d",
    "conv2d_backward",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "dense_conv2d_weight_grad",
    "empty_image",
    "follow_tf32",
    "has_cuda_kernels",
    "is_channels_last",
    "kronecker_conv2d_grad",
    "kronecker_grad",
    "kronecker_labels",
    "label_grad",
    "labelled_conv2d",
    "labelled_conv2d_input_grad",
    "labelled_conv2d_weight_grad",
    "mask_weight",
    "one_by_one",
    "pack",
    "prologue_conv2d",
    "prologue_conv2d_input_grad",
    "prologue_conv2d_weight_grad",
    "quantize",
    "quantized_conv2d",
    "quantized_pack",
    "row_labels",
    "separable_conv2d",
    "tf32_allowed",
    "two_level",
    "unavailable",
    "unpack",
]

LIBRARY = Path(__file__).with_name("_native.so")


Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _load() -> str | None:
    if not LIBRARY.exists():
        return f"the native library {LIBRARY.name} was not built into this installation"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the native library could not be loaded: {error}; {error.__cause__}"
    return None


unavailable: str | None = _load()
"""Why there are no native operations, or ``None`` where there are."""

has_cuda_kernels: bool = unavailable is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "groupconv::conv2d", "CUDA"
)
"""Whether the native library was built with CUDA."""


def is_channels_last(x: torch.Tensor) -> bool:
    """torch's own rule for the memory format of a convolution's output, by strides alone."""
    stride_c = x.stride(1)
    if stride_c == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 0 and least == stride_c):
            return False
        least = stride * size if size > 1 else stride
    return True


def empty_image(
    like: torch.Tensor, sizes: tuple[int, int, int, int], channels_last: bool
) -> torch.Tensor:
    _, c, h, w = (size if isinstance(size, torch.SymInt) else max(size, 1) for size in sizes)
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return like.new_empty_strided(sizes, strides)


def _check_devices(*tensors: torch.Tensor | None) -> None:
    # One meta tensor among real ones brings a call here too: nothing in its result would be set.
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"the operands are on {sorted(map(str, devices))}; expected one device")


def _fake_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    table: torch.Tensor,
    out_channels: int,
    *window_and_activation: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, residual, table)
    window = Window(*window_and_activation[:8])
    size = window.output_size(x.shape[2], x.shape[3], weight.shape[1], weight.shape[2])
    return empty_image(x, (x.shape[0], out_channels, *size), is_channels_last(x))


def _fake_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    in_channels: int,
    height: int,
    width: int,
    *window_and_layout: int,
) -> torch.Tensor:
    _check_devices(grad, weight, table)
    sizes = (grad.shape[0], in_channels, height, width)
    return empty_image(grad, sizes, bool(window_and_layout[-1]))


def _fake_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    entries: int,
    kernel_h: int,
    kernel_w: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(grad, x, table)
    return x.new_empty(entries, kernel_h, kernel_w)


def _fake_backward(
    grad: torch.Tensor,
    output: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    *window_activation_and_wanted: int,
) -> Triple:
    _check_devices(grad, output, x, weight, table)
    want_input, want_weight, want_bias = window_activation_and_wanted[-3:]
    n, c, h, w = x.shape
    return (
        empty_image(x, (n, c, h, w), is_channels_last(x)) if want_input else x.new_empty(0),
        weight.new_empty(weight.shape) if want_weight else x.new_empty(0),
        x.new_empty(grad.shape[1] if want_bias else 0),
    )


# ---- with a prologue -----------------------------------------------------------------------------


def _fake_prologue_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, scale, shift)
    return _fake_conv2d(x, weight, bias, residual, *rest)


def _fake_prologue_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    table: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, x, scale, shift, table)
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    by_scale, by_shift = (
        x.new_empty(x.shape[1], dtype=compute_dtype(x)),
        x.new_empty(x.shape[1], dtype=compute_dtype(x)),
    )
    return empty_image(x, sizes, is_channels_last(x)), by_scale, by_shift


def _fake_prologue_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    relu: bool,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, scale, shift)
    return _fake_weight_grad(grad, x, *rest)


# ---- on learned groups -------------------------------------------------------------------------


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What kernels add up in: float32 for what is narrower."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _fake_pack(
    dense: torch.Tensor, table: torch.Tensor, entries: int, narrow: bool
) -> torch.Tensor:
    _check_devices(dense, table)
    dtype = torch.bfloat16 if narrow else dense.dtype
    return dense.new_empty(entries, *dense.shape[2:], dtype=dtype)


def _fake_unpack(
    packed: torch.Tensor, table: torch.Tensor, out_channels: int, in_channels: int, widen: bool
) -> torch.Tensor:
    _check_devices(packed, table)
    dtype = torch.float32 if widen else packed.dtype
    return packed.new_empty(out_channels, in_channels, *packed.shape[1:], dtype=dtype)


def _fake_row_labels(logits: torch.Tensor, owner: str) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


def _fake_kronecker_labels(
    gates: torch.Tensor, in_channels: int, out_channels: int, owner: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        gates.new_empty(in_channels, dtype=torch.int32),
        gates.new_empty(out_channels, dtype=torch.int32),
    )


def _fake_labelled_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, in_labels, out_labels)
    size = Window(*window).output_size(x.shape[2], x.shape[3], weight.shape[2], weight.shape[3])
    return empty_image(x, (x.shape[0], weight.shape[0], *size), is_channels_last(x))


def _fake_labelled_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    height: int,
    width: int,
    *window_and_layout: int,
) -> torch.Tensor:
    _check_devices(grad, weight, in_labels, out_labels)
    sizes = (grad.shape[0], weight.shape[1], height, width)
    return empty_image(grad, sizes, bool(window_and_layout[-1]))


def _fake_labelled_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    groups: int,
    kernel_h: int,
    kernel_w: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(grad, x, in_labels, out_labels)
    return x.new_empty(grad.shape[1], x.shape[1], kernel_h, kernel_w)


def _fake_dense_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, kernel_h: int, kernel_w: int, *window: int
) -> torch.Tensor:
    _check_devices(grad, x)
    return x.new_empty(grad.shape[1], x.shape[1], kernel_h, kernel_w)


def _fake_mask_weight(
    weight: torch.Tensor, in_labels: torch.Tensor, out_labels: torch.Tensor
) -> torch.Tensor:
    _check_devices(weight, in_labels, out_labels)
    return weight.new_empty(weight.shape)


def _fake_label_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    in_labels: torch.Tensor,
    out_labels: torch.Tensor,
    winner: bool,
    masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, in_labels, out_labels)
    return (
        grad.new_empty(weight.shape if masked else (0,)),
        input_logits.new_empty(input_logits.shape),
        output_logits.new_empty(output_logits.shape),
    )


def _fake_kronecker_grad(
    grad: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, weight, gates)
    return weight.new_empty(weight.shape), weight.new_empty(
        gates.shape, dtype=compute_dtype(weight)
    )


def _fake_kronecker_conv2d_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gates: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, x)
    return _fake_kronecker_grad(grad, weight, gates)


# ---- layers of more than one convolution -------------------------------------------------------


def _fake_two_level(
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    coarse: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    *window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(x, weight, restriction, coarse, bias, table)
    height, width = restriction.shape[1:]
    size = Window(*window).output_size(x.shape[2], x.shape[3], height, width)
    outputs, groups = coarse.shape
    return (
        empty_image(x, (x.shape[0], outputs, *size), is_channels_last(x)),
        empty_image(x, (x.shape[0], groups, *size), is_channels_last(x)),
    )


def _fake_separable_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    activation: int,
    pointwise_weight: torch.Tensor,
    pointwise_bias: torch.Tensor | None,
    pointwise_table: torch.Tensor,
    pointwise_activation: int,
    residual: torch.Tensor | None,
    channels: int,
    out_channels: int,
    *window: int,
) -> torch.Tensor:
    _check_devices(x, weight, bias, pointwise_weight, pointwise_bias, residual)
    _check_devices(x, table, pointwise_table)
    height, width = weight.shape[1:]
    size = Window(*window).output_size(x.shape[2], x.shape[3], height, width)
    return empty_image(x, (x.shape[0], out_channels, *size), is_channels_last(x))


def _fake_chain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    out_channels: int,
    activation: int,
) -> torch.Tensor:
    _check_devices(x, bias, *weights, *tables)
    return empty_image(x, (x.shape[0], out_channels, x.shape[2], x.shape[3]), is_channels_last(x))


def _fake_chain_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    entries: int,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(grad, x, *weights, *tables)
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    input_grad = empty_image(x, sizes, is_channels_last(x)) if needs_input_grad else x.new_empty(0)
    return input_grad, x.new_empty(entries if needs_weight_grad else 0)


# ---- of bytes ------------------------------------------------------------------------------------


def _fake_quantized_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    start: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    out_channels: int,
    kernel_h: int,
    kernel_w: int,
    *rest: Any,
) -> torch.Tensor:
    _check_devices(x, weight, start, scale, table)
    size = Window(*rest[:8]).output_size(x.shape[2], x.shape[3], kernel_h, kernel_w)
    like = scale if rest[-1] else x
    return empty_image(like, (x.shape[0], out_channels, *size), is_channels_last(x))


def _fake_quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    sizes = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    return empty_image(x.new_empty(0, dtype=torch.uint8), sizes, is_channels_last(x))


def _fake_quantized_pack(
    weight: torch.Tensor, table: torch.Tensor, in_channels: int, out_channels: int
) -> torch.Tensor:
    _check_devices(weight, table)
    # Only the table knows how many numbers fill the quads up.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


Batched = tuple[torch.Tensor, int]


def _fold(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """The batch that vmap added, as more images of the batch that is there."""
    moved = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    return moved.flatten(0, 1)


def _unfold(y: torch.Tensor, size: int) -> Batched:
    return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0


def one_by_one(op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Every weight of a batch of weights is a convolution of its own."""

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [pick(part, part_dim, i) for part, part_dim in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    results = [
        op(*(pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], tuple):
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(results), 0


def _batch_conv2d(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    x, weight, bias, residual, *rest = args
    x_dim, weight_dim, bias_dim, residual_dim, *_ = in_dims
    if weight_dim is not None or bias_dim is not None:
        batched: Batched = one_by_one(conv2d, size, in_dims, args)
        return batched
    if residual is not None:
        residual = _fold(residual, residual_dim, size)
    y = conv2d(_fold(x, x_dim, size), weight, bias, residual, *rest)
    return _unfold(y, size)


def _batch_input_grad(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    if in_dims[1] is not None:
        batched: Batched = one_by_one(conv2d_input_grad, size, in_dims, args)
        return batched
    grad, *rest = args
    return _unfold(conv2d_input_grad(_fold(grad, in_dims[0], size), *rest), size)


def _batch_prologue_conv2d(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    x, weight, bias, residual, *rest = args
    x_dim, weight_dim, bias_dim, residual_dim, scale_dim, shift_dim, *_ = in_dims
    if any(dim is not None for dim in (weight_dim, bias_dim, scale_dim, shift_dim)):
        batched: Batched = one_by_one(prologue_conv2d, size, in_dims, args)
        return batched
    if residual is not None:
        residual = _fold(residual, residual_dim, size)
    return _unfold(prologue_conv2d(_fold(x, x_dim, size), weight, bias, residual, *rest), size)


def _batch_weight_grad(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    batched: Batched = one_by_one(conv2d_weight_grad, info.batch_size, in_dims, args)
    return batched


def _batch_chain(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    x, *rest = args
    x_dim, weight_dims, bias_dim, *_ = in_dims
    if bias_dim is not None or any(dim is not None for dim in weight_dims or ()):
        batched: Batched = one_by_one(chain, size, in_dims, args)
        return batched
    return _unfold(chain(_fold(x, x_dim, size), *rest), size)


def _register(name: str, fake: Callable[..., Any], batch: Callable[..., Batched]) -> Any:
    if unavailable is not None:

        def refuse(*_: Any) -> Any:
            raise RuntimeError(f"groupconv::{name} cannot run: {unavailable}")

        return refuse
    torch.library.register_fake(f"groupconv::{name}", fake)
    torch.library.register_vmap(f"groupconv::{name}", batch)
    return getattr(torch.ops.groupconv, name).default


def _register_looping(name: str, fake: Callable[..., Any]) -> Any:
    """An operation whose batching rule calls it for one after another."""

    def batch(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(op, info.batch_size, in_dims, args)

    op = _register(name, fake, batch)
    return op


def tf32_allowed() -> bool:
    """Whether PyTorch lets float32 convolutions round their factors to TF32.

    Asked so that either of PyTorch's two ways to say it is understood: reading ``allow_tf32`` is an
    error once the newer one was used.
    """
    allowed: bool = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return allowed


# A constant to torch.compile, as it is to the convolutions that the compiler itself emits.
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]

_tf32 = SimpleNamespace(allowed=False)


def follow_tf32(x: torch.Tensor) -> None:
    """Let the CUDA kernels multiply float32 in TF32 exactly where torch lets its convolutions.

    Compiled code keeps what was the case before it was first run.
    """
    if x.dtype != torch.float32 or not x.is_cuda or is_compiling():
        return
    allowed = tf32_allowed()
    if allowed != _tf32.allowed and has_cuda_kernels:
        torch.ops.groupconv.allow_tf32.default(allowed)
        _tf32.allowed = allowed


Op = Callable[..., torch.Tensor]
conv2d: Op = _register("conv2d", _fake_conv2d, _batch_conv2d)
conv2d_input_grad: Op = _register("conv2d_input_grad", _fake_input_grad, _batch_input_grad)
conv2d_weight_grad: Op = _register("conv2d_weight_grad", _fake_weight_grad, _batch_weight_grad)

prologue_conv2d: Op = _register("prologue_conv2d", _fake_prologue_conv2d, _batch_prologue_conv2d)
prologue_conv2d_weight_grad: Op = _register_looping(
    "prologue_conv2d_weight_grad", _fake_prologue_weight_grad
)

pack: Op = _register_looping("pack", _fake_pack)
unpack: Op = _register_looping("unpack", _fake_unpack)
row_labels: Op = _register_looping("row_labels", _fake_row_labels)
labelled_conv2d: Op = _register_looping("labelled_conv2d", _fake_labelled_conv2d)
labelled_conv2d_input_grad: Op = _register_looping(
    "labelled_conv2d_input_grad", _fake_labelled_input_grad
)
labelled_conv2d_weight_grad: Op = _register_looping(
    "labelled_conv2d_weight_grad", _fake_labelled_weight_grad
)
dense_conv2d_weight_grad: Op = _register_looping(
    "dense_conv2d_weight_grad", _fake_dense_weight_grad
)
mask_weight: Op = _register_looping("mask_weight", _fake_mask_weight)

conv2d_backward: Callable[..., Triple] = _register_looping("conv2d_backward", _fake_backward)
kronecker_labels: Callable[..., Pair] = _register_looping(
    "kronecker_labels", _fake_kronecker_labels
)
kronecker_grad: Callable[..., Pair] = _register_looping("kronecker_grad", _fake_kronecker_grad)
kronecker_conv2d_grad: Callable[..., Pair] = _register_looping(
    "kronecker_conv2d_grad", _fake_kronecker_conv2d_grad
)
label_grad: Callable[..., Triple] = _register_looping("label_grad", _fake_label_grad)
prologue_conv2d_input_grad: Callable[..., Triple] = _register_looping(
    "prologue_conv2d_input_grad", _fake_prologue_input_grad
)
chain: Op = _register("chain", _fake_chain, _batch_chain)
chain_grad: Callable[..., Pair] = _register_looping("chain_grad", _fake_chain_grad)
separable_conv2d: Op = _register_looping("separable_conv2d", _fake_separable_conv2d)
quantize: Op = _register_looping("quantize", _fake_quantize)
quantized_conv2d: Op = _register_looping("quantized_conv2d", _fake_quantized_conv2d)
quantized_pack: Op = _register_looping("quantized_pack", _fake_quantized_pack)
two_level: Callable[..., Pair] = _register_looping("two_level", _fake_two_level)
