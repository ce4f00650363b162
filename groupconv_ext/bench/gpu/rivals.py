"""The contenders on a GPU: those of the benchmark on the CPU, and what only pays here.

cuDNN is always allowed to look for its best algorithm (``cudnn.benchmark``). ``compiled`` is left
out unless it is asked for: it takes a minute to compile a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from groupconv_ext import backends, functional
from groupconv_ext.backends import Call
from groupconv_ext.backends.measure import milliseconds
from groupconv_ext.backends.triton import TUNED, load

from .. import methods
from ..methods import Case, Method
from ..problems import Problem
from ..rivals import CONTENDERS as ON_THE_CPU
from ..rivals import Contender

__all__ = ["CONTENDERS", "OURS", "contenders"]

OURS = ("native", "triton", "triton-tuned")


def _ours(backend: str) -> Callable[[Case], Method]:
    def method(case: Case) -> Method:
        problem, partition = case.problem, case.partition
        settings = {"stride": problem.stride, "padding": problem.padding, "backend": backend}

        def function(x: Tensor, weight: Tensor) -> Tensor:
            return functional.conv2d(x, weight, partition=partition, **settings)  # type: ignore[arg-type]

        return Method(function, case.weight)

    return method


def _refused_by(backend: str, device: torch.device) -> Callable[[Problem], str | None]:
    def refuses(problem: Problem) -> str | None:
        call = Call(device.type, problem.torch_dtype, problem.trains)
        reason = backends.explain(call.device_type, call.dtype, needs_grad=call.needs_grad)[backend]
        return None if reason is None else f"it {reason}"

    return refuses


def tuned(case: Case) -> Method:
    """The Triton kernels with the fastest launch of each, measured beforehand on this case."""
    method = _ours("triton")(case)
    trains = case.problem.trains
    x = case.x.detach().requires_grad_(trains)
    weight = case.weight.detach().requires_grad_(trains)

    def call() -> None:
        y = method.function(x, weight)
        if trains:
            torch.autograd.grad(y, (x, weight), case.grad_output)

    load()
    TUNED.tune(call, partial(milliseconds, device=x.device))
    return method


# ---- what only pays on a GPU ---------------------------------------------------------------------


def gemm(case: Case) -> Method:
    """A pointwise layer as one product with a dense weight, zeros off the mask."""
    partition, trains, layout = case.partition, case.problem.trains, case.problem.layout
    mask = partition.mask(case.problem.torch_dtype, case.x.device)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        dense = weight * mask if trains else weight
        if layout == "NHWC":
            return torch.matmul(x.permute(0, 2, 3, 1), dense.T).permute(0, 3, 1, 2)
        n, _, height, width = x.shape
        return torch.matmul(dense, x.flatten(2)).view(n, -1, height, width)

    def to_packed(weight: Tensor) -> Tensor:
        return partition.pack(weight)[:, None, None]

    return Method(function, partition.unpack(case.weight)[:, :, 0, 0].contiguous(), to_packed)


def batched(case: Case) -> Method:
    """A pointwise layer of even groups: gather, one batched product over the groups, scatter."""
    problem, partition = case.problem, case.partition
    groups, layout = partition.groups, problem.layout
    outs, ins = partition.sizes[0]
    gather = partition.read_order(case.x.device)
    scatter = partition.write_order(case.x.device)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if layout == "NCHW":
            taken = x.index_select(1, gather).view(n, groups, ins, height * width)
            y = torch.matmul(weight, taken)
            return y.view(n, -1, height, width).index_select(1, scatter)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(1, gather)
        y = torch.bmm(pixels.view(-1, groups, ins).transpose(0, 1), weight.transpose(1, 2))
        y = y.transpose(0, 1).reshape(-1, groups * outs).index_select(1, scatter)
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)

    def to_packed(weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1, 1)

    return Method(function, case.weight.view(groups, outs, ins), to_packed)


def grouped_mm(case: Case) -> Method:
    """PyTorch's grouped product, cut along the summed dimension: gather, product, scatter."""
    partition = case.partition
    device = case.x.device
    gather = partition.read_order(device)
    most = partition.widest[0]
    ends = torch.tensor([ins for _, ins in partition.sizes], device=device).cumsum(0)
    ends = ends.to(torch.int32)
    columns = torch.cat(
        [torch.arange(outs) + g * most for g, (outs, _) in enumerate(partition.sizes)]
    )
    columns = columns.to(device)[partition.write_order(device)]
    weight = case.weight.new_zeros(len(gather), most)
    row = entry = 0
    for outs, ins in partition.sizes:
        block = case.weight[entry : entry + outs * ins].view(outs, ins)
        weight[row : row + ins, :outs] = block.T
        row, entry = row + ins, entry + outs * ins

    def function(x: Tensor, weight: Tensor) -> Tensor:
        n, _, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(1, gather)
        y: Tensor = torch._grouped_mm(pixels, weight, offs=ends)
        y = y.permute(1, 0, 2).reshape(len(pixels), -1).index_select(1, columns)
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)

    return Method(function, weight)


def compiled(case: Case) -> Method:
    """The usual way through ``torch.compile(mode="max-autotune")``."""
    plain = methods.aten(case)
    function = torch.compile(plain.function, mode="max-autotune-no-cudagraphs", fullgraph=True)
    return Method(function, plain.weight, plain.to_packed)


def ungrouped(case: Case) -> Method:
    """The vendor's own grouped call with the permutation folded into the neighbouring layers."""
    problem, partition = case.problem, case.partition
    _, ins = partition.sizes[0]
    weight = case.weight.reshape(problem.out_channels, ins, problem.kernel, problem.kernel)
    call = partial(conv2d, stride=problem.stride, padding=problem.padding, groups=partition.groups)
    return Method(call, weight, lambda weight: weight.flatten(0, 1))


# ---- reasons against -----------------------------------------------------------------------------


def _not_pointwise(problem: Problem) -> str | None:
    plain = problem.kernel == 1 and problem.stride == 1
    return None if plain else "the layer is not a plain 1×1"


def _not_even_pointwise(problem: Problem) -> str | None:
    reason = _not_pointwise(problem)
    return reason or (None if problem.partition.is_even else "the groups are ragged")


def _no_grouped_mm(problem: Problem) -> str | None:
    if reason := _not_pointwise(problem):
        return reason
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no _grouped_mm"
    if problem.trains:
        return "it has no gradient along this dimension"
    if problem.dtype != "bfloat16" or problem.layout != "NHWC":
        return "it takes bfloat16 pixels × channels"
    aligned = all(ins % 8 == 0 for _, ins in problem.partition.sizes)
    aligned = aligned and problem.partition.widest[0] % 8 == 0
    return None if aligned else "group sizes are no multiples of 16 bytes"


def _ragged(problem: Problem) -> str | None:
    return None if problem.partition.is_even else "groups are ragged: one grouped call cannot do it"


_FROM_THE_CPU = (
    *("aten", "aten-other-layout", "aten-inverse", "channel-shuffle", "padded", "per-group"),
    *("dense", "dense-other-layout", "aten-contiguous"),
)

CONTENDERS: tuple[Contender, ...] = (
    *(ON_THE_CPU[name] for name in _FROM_THE_CPU),
    Contender("gemm", "one matrix product with a masked dense weight", gemm, _not_pointwise),
    Contender(
        "bmm",
        "gather, one batched product over the groups, scatter",
        batched,
        _not_even_pointwise,
    ),
    Contender("grouped-mm", "gather, torch._grouped_mm, scatter", grouped_mm, _no_grouped_mm),
    Contender(
        "compiled",
        "aten through torch.compile, max-autotune",
        compiled,
        _ragged,
    ),
)


def contenders(
    device: torch.device, *, with_compiled: bool, with_tuned: bool
) -> tuple[Contender, ...]:
    """Ours first, then all others."""
    triton = Contender(
        "triton", "groupconv_ext, backend 'triton'", _ours("triton"), _refused_by("triton", device)
    )
    if with_tuned:
        about = "groupconv_ext, backend 'triton', the launch of every kernel measured beforehand"
        triton = Contender("triton-tuned", about, tuned, triton.refuses)
    native = Contender(
        "native", "groupconv_ext, backend 'native'", _ours("native"), _refused_by("native", device)
    )
    ours = (native, triton)
    others = (c for c in CONTENDERS if with_compiled or c.name != "compiled")
    return (*ours, *others)
