"""What is made beside a convolution's input: how it lies in memory, and what it is added up in."""

from __future__ import annotations

import torch

__all__ = ["compute_dtype", "empty_image", "is_channels_last"]


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
    """An image of these sizes in one of the two memory formats, where sizes may be symbols."""
    _, c, h, w = (size if isinstance(size, torch.SymInt) else max(size, 1) for size in sizes)
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return like.new_empty_strided(sizes, strides)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What kernels add up in: float32 for what is narrower."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
