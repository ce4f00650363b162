"""The native library: loads it, and teaches torch what its operations do without running them.

After import, ``torch.ops.groupconv`` has the operations, each with a fake kernel (shapes and
strides, for ``torch.compile`` and ``torch.export``) and a batching rule (for ``torch.vmap``).
Where the library is missing or cannot be loaded the package works without it, through the other
backends, and ``unavailable`` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_compiling

from . import _fakes

__all__ = [
    "LIBRARY",
    "bare_conv2d",
    "chain",
    "chain_grad",
    "conv2d",
    "conv2d_backward",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "dense_conv2d_weight_grad",
    "follow_tf32",
    "has_cuda_kernels",
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


def _register(name: str, batch: Callable[..., Batched]) -> Any:
    if unavailable is not None:

        def refuse(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"groupconv::{name} cannot run: {unavailable}")

        return refuse
    torch.library.register_fake(f"groupconv::{name}", getattr(_fakes, name))
    torch.library.register_vmap(f"groupconv::{name}", batch)
    op = getattr(torch.ops.groupconv, name).default

    def call(*args: Any, **named: Any) -> Any:
        try:
            return op(*args, **named)
        except RuntimeError as error:
            if "out of memory: " not in str(error):
                raise
            raise _out_of_memory(error, args[0].device) from None

    return call


def _entry(name: str) -> Any:
    """The operation without the Python around it: 0.4 µs less, and errors that torch words."""
    if unavailable is not None:
        return globals()[name]
    overload = getattr(torch.ops.groupconv, name).default
    # What OpOverload.__call__ calls, and does nothing else.
    return getattr(overload, "_op", overload)


def _out_of_memory(error: RuntimeError, device: torch.device) -> RuntimeError:
    """Torch's own error for memory that an operation could not get.

    The stable interface tells the library that an allocation failed and nothing else. So torch is
    asked for as much once more, from here, where its own error and all that it says come through.
    """
    found = re.search(r"out of memory: (\d+) bytes", str(error))
    try:
        torch.empty(int(found[1]) if found else 0, dtype=torch.uint8, device=device)
    except RuntimeError as own:
        return own
    # There is as much by now: what else the operation had taken is free again.
    return torch.OutOfMemoryError(str(error))


def _register_looping(name: str) -> Any:
    """An operation whose batching rule calls it for one after another."""

    def batch(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(op, info.batch_size, in_dims, args)

    op = _register(name, batch)
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
conv2d: Op = _register("conv2d", _batch_conv2d)
bare_conv2d: Op = _entry("conv2d")
conv2d_input_grad: Op = _register("conv2d_input_grad", _batch_input_grad)
conv2d_weight_grad: Op = _register("conv2d_weight_grad", _batch_weight_grad)

prologue_conv2d: Op = _register("prologue_conv2d", _batch_prologue_conv2d)
prologue_conv2d_weight_grad: Op = _register_looping("prologue_conv2d_weight_grad")

pack: Op = _register_looping("pack")
unpack: Op = _register_looping("unpack")
row_labels: Op = _register_looping("row_labels")
labelled_conv2d: Op = _register_looping("labelled_conv2d")
labelled_conv2d_input_grad: Op = _register_looping("labelled_conv2d_input_grad")
labelled_conv2d_weight_grad: Op = _register_looping("labelled_conv2d_weight_grad")
dense_conv2d_weight_grad: Op = _register_looping("dense_conv2d_weight_grad")
mask_weight: Op = _register_looping("mask_weight")

conv2d_backward: Callable[..., _fakes.Triple] = _register_looping("conv2d_backward")
kronecker_labels: Callable[..., _fakes.Pair] = _register_looping("kronecker_labels")
kronecker_grad: Callable[..., _fakes.Pair] = _register_looping("kronecker_grad")
kronecker_conv2d_grad: Callable[..., _fakes.Pair] = _register_looping("kronecker_conv2d_grad")
label_grad: Callable[..., _fakes.Triple] = _register_looping("label_grad")
prologue_conv2d_input_grad: Callable[..., _fakes.Triple] = _register_looping(
    "prologue_conv2d_input_grad"
)
chain: Op = _register("chain", _batch_chain)
chain_grad: Callable[..., _fakes.Pair] = _register_looping("chain_grad")
separable_conv2d: Op = _register_looping("separable_conv2d")
quantize: Op = _register_looping("quantize")
quantized_conv2d: Op = _register_looping("quantized_conv2d")
quantized_pack: Op = _register_looping("quantized_pack")
two_level: Callable[..., _fakes.Pair] = _register_looping("two_level")
