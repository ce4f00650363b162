"""The two-level group convolution as a function, with one pass over the output.

    z_k = R_k * x[inputs_k]                                  one channel for every group k
    y[outputs_k] = A_k * x[inputs_k] + S[outputs_k] z + bias[outputs_k]

(two_level, eq. 3.3-3.5). In the native operation for the CPU z_k is one more output of A's group k,
made from what that group reads anyway, and S z is added to a tile of y while it lies in cache;
groups of many channels take A, R and S one by one, S in place. The CUDA kernels make z first; A's
convolution then reads it like the channels of one more tap. Backwards the gradients of y and z go
through A and R as one convolution, or through each where copying the weights would cost more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ._layout import is_channels_last
from .autograd import apply, convolve, input_grad, wants_grad, weight_grad
from .backends import Call, choose, device_name
from .backends.choice import best_way
from .backends.measure import measure_calls
from .backends.native import NATIVE
from .backends.registry import Question
from .backends.triton import TRITON, TRITON_OPERATIONS, load
from .functional import conv2d
from .operations import NATIVE_OPERATIONS, Operations
from .partition import Partition
from .window import POINTWISE, IntOrPair, Padding, Window, make_window

__all__ = ["TwoLevelPartitions", "two_level_conv2d"]


class TwoLevelPartitions:
    """The partitions of A (given), R and S.

    Attributes:
        within: A's, even and contiguous.
        restrict: R's, one output for each of the groups.
        spread: S's, one group from all of z to all outputs.
        together: A's and R's as one, to y and, behind it, z.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        self.within = Partition.contiguous(in_channels, out_channels, groups)
        self.restrict = Partition.contiguous(in_channels, groups, groups)
        self.spread = Partition.contiguous(groups, out_channels, 1)
        reads, writes = (
            [channel * groups // channels for channel in range(channels)]
            for channels in (in_channels, out_channels)
        )
        self.together = Partition.from_labels(reads, [*writes, *range(groups)], groups)


def two_level_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    coarse: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    partitions: TwoLevelPartitions,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolve ``x`` ``[B, C, H, W]``.

    Args:
        x: The input.
        weight: A, ``[N, C / G, kh, kw]``.
        restriction: R, ``[G, C / G, kh, kw]``.
        coarse: S, ``[N, G]``.
        bias: ``[N]``.
        partitions: Of A, R and S.
        stride: As in :func:`~groupconv_ext.conv2d`, and so are the rest.
        padding: See ``stride``.
        dilation: See ``stride``.
        backend: The native kernels for the CPU do both levels in one pass over x, those for CUDA
            and the Triton kernels add the second to the first before it is rounded, every other
            backend takes three convolutions. ``auto`` on a GPU measures all of these.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    needs_grad = wants_grad(x, weight, restriction, coarse, bias)
    call = Call(device, dtype, needs_grad, forward_ad._current_level >= 0)
    fits = x.dim() == 4 and x.shape[1] == partitions.within.in_channels and weight.dtype == x.dtype
    settings = (partitions, stride, padding, dilation, backend)
    measured = backend == "auto" and device == "cuda"
    operations = None if measured else _fused_by(backend, call)
    if not (fits or autocast) or (operations is None and not measured):
        # What does not fit is refused by conv2d.
        return _one_by_one(x, weight, restriction, coarse, bias, *settings)
    if autocast:
        x, weight, restriction, coarse = (t.to(dtype) for t in (x, weight, restriction, coarse))
        bias = None if bias is None else bias.to(dtype)
    window = make_window(weight.shape[2], weight.shape[3], stride, padding, dilation)
    window.output_size(x.shape[2], x.shape[3], weight.shape[2], weight.shape[3])  # or an error
    tensors = (x, weight, restriction, coarse, bias)
    if measured:
        operations = _fastest(call, tensors, window, settings)
    if operations is None:
        return _one_by_one(*tensors, *settings)
    return _at_once(*tensors, partitions, window, operations)


_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
_Settings = tuple[TwoLevelPartitions, IntOrPair, Padding, IntOrPair, str]


def _one_by_one(
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    coarse: torch.Tensor,
    bias: torch.Tensor | None,
    partitions: TwoLevelPartitions,
    stride: IntOrPair,
    padding: Padding,
    dilation: IntOrPair,
    backend: str,
) -> torch.Tensor:
    """Three convolutions."""
    settings: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "backend": backend,
    }
    # A first: what is wrong with x is said of its partition, which is the layer's.
    within = conv2d(x, weight, partition=partitions.within, **settings)
    z = conv2d(x, restriction, partition=partitions.restrict, **settings)
    columns = coarse[:, :, None, None]
    spread = partitions.spread
    return conv2d(z, columns, bias, partition=spread, residual=within, backend=backend)


def _at_once(
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    coarse: torch.Tensor,
    bias: torch.Tensor | None,
    partitions: TwoLevelPartitions,
    window: Window,
    operations: Operations,
) -> torch.Tensor:
    """One operation."""
    tensors = (x, weight.flatten(0, 1), restriction.flatten(0, 1), coarse, bias)
    stages = (partitions.within, partitions.restrict)
    if not wants_grad(*tensors):
        return operations.two_level(*tensors, *stages, window)[0]
    y: torch.Tensor = apply(
        _TwoLevel, *tensors, *stages, partitions.spread, partitions.together, window, operations
    )[0]
    return y


def _fused_by(backend: str, call: Call) -> Operations | None:
    """The operations that do both levels at once, if the backend for the call has such."""
    chosen = choose(backend, call)
    if chosen is TRITON:
        load()
        return TRITON_OPERATIONS
    return NATIVE_OPERATIONS if chosen.name == "native" else None


def _fastest(
    call: Call, tensors: _Tensors, window: Window, settings: _Settings
) -> Operations | None:
    """What ``auto`` takes on a GPU: the operations of a backend, or none for one by one.

    Each of the three convolutions then takes what is the fastest for it. That is also what happens
    where nothing may be measured, and in graphs of ``torch.compile``.
    """
    if is_compiling():
        return None
    capable = [backend for backend in (NATIVE, TRITON) if backend.why_not(call) is None]
    ways = {backend.name: _fused_by(backend.name, call) for backend in capable}
    if not ways:
        return None
    x, weight, restriction, coarse, bias = tensors
    partitions = settings[0]

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_(call.needs_grad)

    def measured(operations: Operations | None) -> Callable[[], None]:
        added = None if bias is None else leaf(bias)
        leaves = (leaf(x), leaf(weight), leaf(restriction), leaf(coarse), added)

        def run() -> None:
            with torch.set_grad_enabled(call.needs_grad):
                if operations is None:
                    y = _one_by_one(*leaves, *settings)
                else:
                    y = _at_once(*leaves, partitions, window, operations)
                if call.needs_grad:
                    wanted = [t for t in leaves if t is not None]
                    torch.autograd.grad(y, wanted, torch.ones_like(y))

        return run

    def times() -> dict[str, float]:
        calls = {name: measured(by) for name, by in ways.items()}
        return measure_calls(calls | {_ONE_BY_ONE: measured(None)}, x.device)

    packed = weight.flatten(0, 1)
    question = Question.of(x, packed, partitions.within, window, call.needs_grad, False)
    names = (*ways, _ONE_BY_ONE)
    found = best_way("two levels", question, names, x, times, device_name(x.device))
    return ways.get(found) if found is not None else None


_ONE_BY_ONE = "one by one"


class _TwoLevel(torch.autograd.Function):
    """y and z; z for the backward pass, which differentiates the three convolutions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        restriction: torch.Tensor,
        coarse: torch.Tensor,
        bias: torch.Tensor | None,
        within: Partition,
        restrict: Partition,
        spread: Partition,
        together: Partition,
        window: Window,
        operations: Operations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return operations.two_level(x, weight, restriction, coarse, bias, within, restrict, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, restriction, coarse, _, *settings = inputs
        ctx.within, ctx.restrict, ctx.spread, ctx.together, ctx.window, ctx.operations = settings
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, restriction, coarse, output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, restriction, coarse, z = ctx.saved_tensors
        by = ctx.operations
        need_x, need_weight, need_restriction, need_coarse, need_bias, *_ = ctx.needs_input_grad
        if wants_grad(x, restriction):  # z as it came out of the kernel has no derivatives
            z = convolve(x, restriction, None, None, ctx.restrict, ctx.window, "none", by)
        wanted = (need_x, need_weight, need_restriction)
        grads: tuple[torch.Tensor | None, ...] = (None, None, None)
        by_z, by_coarse = _spread_grads(grad, z, coarse, ctx.spread, (any(wanted), need_coarse), by)
        if by_z is not None:
            # Together they copy y's gradient and the weights, apart they read x twice.
            apart = x.is_cpu and weight.numel() > grad.numel()
            through = _grads_apart if apart else _grads_together
            grads = through(ctx, x, weight, restriction, grad, by_z, wanted)
        by_bias = grad.sum((0, 2, 3)) if need_bias else None
        return *grads, by_coarse, by_bias, *(None,) * 6


def _spread_grads(
    grad: torch.Tensor,
    z: torch.Tensor,
    coarse: torch.Tensor,
    spread: Partition,
    wanted: tuple[bool, bool],
    by: Operations,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The wanted ones of ∂L/∂z and ∂L/∂S."""
    need_z, need_coarse = wanted
    columns = coarse.reshape(-1, 1, 1)
    made = None
    if any(wanted) and not torch.is_grad_enabled():  # nobody differentiates this again
        asked = (*wanted, False)
        made = by.backward(grad, None, z, columns, spread, POINTWISE, "none", asked)
    if made is not None:
        by_z, by_columns, _ = made
    else:
        size, last = (z.shape[2], z.shape[3]), is_channels_last(z)
        by_z = by_columns = None
        if need_z:
            by_z = input_grad(grad, columns, spread, POINTWISE, size, last, by)
        if need_coarse:
            by_columns = weight_grad(grad, z, spread, POINTWISE, (1, 1), by)
    return by_z, None if by_columns is None else by_columns.view_as(coarse)


_Wanted = tuple[bool, bool, bool]


def _grads_together(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    by_y: torch.Tensor,
    by_z: torch.Tensor,
    wanted: _Wanted,
) -> tuple[torch.Tensor | None, ...]:
    """The wanted ones of ∂L/∂x, ∂L/∂A and ∂L/∂R, A and R as one convolution."""
    need_x, need_weight, need_restriction = wanted
    call = (ctx.together, ctx.window)
    shape = (by_z.shape[1], -1, *weight.shape[1:])  # a group's rows, first A's and then R's
    own = weight.reshape(shape).shape[1]
    by_both = torch.cat((by_y, by_z), 1)
    by_x = by_weight = by_restriction = None
    if need_x:
        rows = torch.cat((weight.reshape(shape), restriction.reshape(shape)), 1).flatten(0, 1)
        size = (x.shape[2], x.shape[3])
        by_x = input_grad(by_both, rows, *call, size, is_channels_last(x), ctx.operations)
    if need_weight or need_restriction:
        kernel = (weight.shape[1], weight.shape[2])
        by_rows = weight_grad(by_both, x, *call, kernel, ctx.operations).view(shape)
        by_weight = by_rows[:, :own].reshape_as(weight)
        by_restriction = by_rows[:, own:].reshape_as(restriction)
    return by_x, by_weight, by_restriction


def _grads_apart(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    restriction: torch.Tensor,
    by_y: torch.Tensor,
    by_z: torch.Tensor,
    wanted: _Wanted,
) -> tuple[torch.Tensor | None, ...]:
    """The same, A and R one after the other."""
    need_x, need_weight, need_restriction = wanted
    kernel = (weight.shape[1], weight.shape[2])
    size, last = (x.shape[2], x.shape[3]), is_channels_last(x)
    within, restrict, window, by = ctx.within, ctx.restrict, ctx.window, ctx.operations
    by_x = by_weight = by_restriction = None
    if need_x:
        by_x = input_grad(by_y, weight, within, window, size, last, by)
        by_x = by_x + input_grad(by_z, restriction, restrict, window, size, last, by)
    if need_weight:
        by_weight = weight_grad(by_y, x, within, window, kernel, by)
    if need_restriction:
        by_restriction = weight_grad(by_z, x, restrict, window, kernel, by)
    return by_x, by_weight, by_restriction
