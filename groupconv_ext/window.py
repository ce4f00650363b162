"""The sliding window of a convolution: what ``F.conv2d`` takes, checked and spelled out.

Inside the library a window is always a :class:`Window`, eight plain integers; ``"same"``, single
numbers and pairs exist only in what users pass.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ._checks import LARGEST

__all__ = ["POINTWISE", "IntOrPair", "Padding", "Window", "is_plain", "make_window"]

IntOrPair: TypeAlias = int | Sequence[int]
Padding: TypeAlias = IntOrPair | str


class Window(NamedTuple):
    """Stride, padding and dilation, in the order in which the native operations take them."""

    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_bottom: int = 0
    pad_left: int = 0
    pad_right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1

    @property
    def stride(self) -> tuple[int, int]:
        """Down, across."""
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right."""
        return self.pad_top, self.pad_bottom, self.pad_left, self.pad_right

    @property
    def dilation(self) -> tuple[int, int]:
        """Down, across."""
        return self.dilation_h, self.dilation_w

    def output_size(self, height: int, width: int, kernel_h: int, kernel_w: int) -> tuple[int, int]:
        """Height and width of the output; an error where the kernel exceeds the padded input."""
        stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w = self
        span_h = dilation_h * (kernel_h - 1) + 1
        span_w = dilation_w * (kernel_w - 1) + 1
        free_h = height + top + bottom - span_h
        free_w = width + left + right - span_w
        if free_h < 0 or free_w < 0:
            raise ValueError(
                f"the kernel spans {span_h}×{span_w} pixels but the padded input has only "
                f"{free_h + span_h}×{free_w + span_w}; enlarge the input or the padding"
            )
        return free_h // stride_h + 1, free_w // stride_w + 1


POINTWISE = Window()
"""Every pixel by itself, where the kernel is 1×1."""


def make_window(
    kernel_h: int, kernel_w: int, stride: IntOrPair, padding: Padding, dilation: IntOrPair
) -> Window:
    """The window that ``F.conv2d`` would use for these arguments."""
    if (
        type(stride) is type(padding) is type(dilation) is int  # the usual case costs little
        and 1 <= stride <= LARGEST
        and 0 <= padding <= LARGEST
        and 1 <= dilation <= LARGEST
        and kernel_h >= 1
        and kernel_w >= 1
    ):
        if stride == dilation == 1 and padding == 0:
            return POINTWISE
        return Window(stride, stride, padding, padding, padding, padding, dilation, dilation)
    stride_h, stride_w = _pair("stride", stride, 1)
    dilation_h, dilation_w = _pair("dilation", dilation, 1)
    if kernel_h < 1 or kernel_w < 1:
        raise ValueError(f"the kernel is {kernel_h}×{kernel_w}; expected at least 1×1")
    if isinstance(padding, str):
        if padding == "valid":
            top = bottom = left = right = 0
        elif padding == "same":
            if stride_h != 1 or stride_w != 1:
                raise ValueError(
                    f"padding='same' needs stride 1, got ({stride_h}, {stride_w}); "
                    "pass the padding as numbers"
                )
            top, bottom = _halves(dilation_h * (kernel_h - 1))
            left, right = _halves(dilation_w * (kernel_w - 1))
        else:
            raise ValueError(f"padding is {padding!r}; expected 'same', 'valid', an int or a pair")
    else:
        top, left = _pair("padding", padding, 0)
        bottom, right = top, left
    return Window(stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w)


def is_plain(value: IntOrPair | Padding) -> bool:
    """Whether this equals nothing but what means the same, as ``1`` equals ``True`` and ``1.0``."""
    if type(value) is tuple and len(value) == 2:
        return type(value[0]) is type(value[1]) is int
    return type(value) is int or type(value) is str


def _halves(total: int) -> tuple[int, int]:
    return total // 2, total - total // 2


def _pair(name: str, value: IntOrPair, least: int) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        first, second = value  # what layers hold, at little cost
    else:
        first, second = _unpack(name, value)
    if not (least <= first <= LARGEST and least <= second <= LARGEST):
        raise ValueError(f"{name} is {value}; expected {least} ≤ {name} ≤ 2³¹ − 1")
    return first, second


def _unpack(name: str, value: IntOrPair) -> tuple[int, int]:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any(isinstance(item, bool) or not hasattr(item, "__index__") for item in items):
        raise TypeError(f"{name} is {value!r}; expected an int or a pair of ints")
    items = [operator.index(item) for item in items]
    if len(items) == 1:
        items *= 2
    if len(items) != 2:
        raise ValueError(f"{name} is {value}, {len(items)} numbers; expected one or two")
    return items[0], items[1]
