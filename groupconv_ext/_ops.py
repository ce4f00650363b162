"""The native library: loads it, and teaches torch what its operations do without running them.

After import, ``torch.ops.groupconv`` has the operations, each with a fake kernel (shapes and
strides, for ``torch.compile`` and ``torch.export``) and a batching rule (for ``torch.vmap``).
Where the library is missing or cannot be loaded the package works without it, through the other
backends, and ``unavailable`` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .window import Window

__all__ = [
    "LIBRARY",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "is_channels_last",
    "unavailable",
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


def _empty(
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
    return _empty(x, (x.shape[0], out_channels, *size), is_channels_last(x))


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
    return _empty(grad, sizes, bool(window_and_layout[-1]))


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


Batched = tuple[torch.Tensor, int]


def _fold(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """The batch that vmap added, as more images of the batch that is there."""
    moved = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    return moved.flatten(0, 1)


def _unfold(y: torch.Tensor, size: int) -> Batched:
    return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0


def _one_by_one(op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Batched:
    """Every weight of a batch of weights is a convolution of its own."""

    def pick(arg: Any, dim: int | None, i: int) -> Any:
        return arg if dim is None else arg.select(dim, i)

    calls = (
        [pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)] for i in range(size)
    )
    return torch.stack([op(*call) for call in calls]), 0


def _batch_conv2d(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    x, weight, bias, residual, *rest = args
    x_dim, weight_dim, bias_dim, residual_dim, *_ = in_dims
    if weight_dim is not None or bias_dim is not None:
        return _one_by_one(conv2d, size, in_dims, args)
    if residual is not None:
        residual = _fold(residual, residual_dim, size)
    y = conv2d(_fold(x, x_dim, size), weight, bias, residual, *rest)
    return _unfold(y, size)


def _batch_input_grad(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    size = info.batch_size
    if in_dims[1] is not None:
        return _one_by_one(conv2d_input_grad, size, in_dims, args)
    grad, *rest = args
    return _unfold(conv2d_input_grad(_fold(grad, in_dims[0], size), *rest), size)


def _batch_weight_grad(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
    return _one_by_one(conv2d_weight_grad, info.batch_size, in_dims, args)


def _register(
    name: str, fake: Callable[..., torch.Tensor], batch: Callable[..., Batched]
) -> Callable[..., torch.Tensor]:
    if unavailable is not None:

        def refuse(*_: Any) -> torch.Tensor:
            raise RuntimeError(f"groupconv::{name} cannot run: {unavailable}")

        return refuse
    torch.library.register_fake(f"groupconv::{name}", fake)
    torch.library.register_vmap(f"groupconv::{name}", batch)
    overload: Callable[..., torch.Tensor] = getattr(torch.ops.groupconv, name).default
    return overload


conv2d = _register("conv2d", _fake_conv2d, _batch_conv2d)
conv2d_input_grad = _register("conv2d_input_grad", _fake_input_grad, _batch_input_grad)
conv2d_weight_grad = _register("conv2d_weight_grad", _fake_weight_grad, _batch_weight_grad)
