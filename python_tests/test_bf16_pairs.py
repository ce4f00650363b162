"""bfloat16 multiplied in pairs, by vectors (vdpbf16ps) and by matrix registers (tdpbf16ps): what
the pairs of a group's channels, and the zeros that fill its last block up, can go wrong at.

Every partition, window and layout is tested in these instruction sets as in all others.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    Geometry,
    check_convolution,
    forced_isa,
    needs_native,
    split,
    tensors,
    window_of,
)

from groupconv_ext import Partition
from groupconv_ext.autograd import ACTIVATIONS
from groupconv_ext.backends.native import NATIVE
from groupconv_ext.doctor import doctor

PAIRED = [isa for isa in ("avx512_bf16", "avx512_amx") if isa in ISAS]

pytestmark = [
    needs_native,
    pytest.mark.native,
    pytest.mark.skipif(not PAIRED, reason="neither vdpbf16ps nor tdpbf16ps here"),
]

AROUND = (1, 1, 1, 1)
TINY = 1e-39  # a denormal, in bfloat16 too


PARTITIONS = {
    "odd counts": Partition(118, 75, split(118, 33, 31, 7, 47), split(75, 17, 16, 31, 11)),
    "odd, full lanes": Partition(65, 96, split(65, 35, 29), split(96, 64, 32)),
    "a group without inputs": Partition(48, 48, split(48, 30, 0, 18), split(48, 16, 16, 16)),
    "overlapping": Partition(
        40, 48, [range(27), range(20, 40), range(1, 40, 2)], split(48, 16, 16, 16)
    ),
    "in order, even": Partition.contiguous(64, 64, 2),
    "in order, odd": Partition.contiguous(66, 64, 2),
    "many vectors of channels": Partition.random(330, 352, 11, seed=0),
    "few channels each": Partition.random(96, 96, 12, seed=0),
}


@pytest.fixture(autouse=True, params=PAIRED)
def paired(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param):
        yield request.param


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "channels_last, channels cut"])
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_channels_in_pairs(partition: Partition, layout: str) -> None:
    geometries = (
        Geometry((9, 13)),
        Geometry((8, 11), (3, 3), padding=AROUND),
        Geometry((17, 9), (3, 3), (2, 2), AROUND),
    )
    for geometry in geometries:
        x, weight, bias = tensors(partition, geometry, dtype=torch.bfloat16)
        check_convolution(
            partition,
            geometry,
            LAYOUTS[layout](x),
            weight,
            bias,
            grad_layout=LAYOUTS[layout],
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_epilogues(layout: str, activation: str) -> None:
    partition, geometry = PARTITIONS["odd, full lanes"], Geometry((9, 9))
    x, weight, bias = tensors(partition, geometry, dtype=torch.bfloat16)
    residual = 3 * torch.randn(len(x), partition.out_channels, 9, 9, dtype=torch.bfloat16)
    check_convolution(partition, geometry, LAYOUTS[layout](x), weight, bias, residual, activation)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("name", ["odd counts", "in order, even", "in order, odd"])
def test_a_weight_wherever_and_however_it_lies(
    name: str, kernel: tuple[int, int], layout: str
) -> None:
    """Two windows of a vector at once or tap by tap, where it is stored or widened before."""
    partition = PARTITIONS[name]
    geometry = Geometry((8, 11), kernel, padding=(2, 2, 2, 2))
    x, weight, _ = tensors(partition, geometry, dtype=torch.bfloat16)
    x = LAYOUTS[layout](x)
    check_convolution(partition, geometry, x, weight, grad_layout=LAYOUTS[layout])
    moved = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view_as(weight).copy_(weight)
    scattered = weight.repeat_interleave(2, dim=2)[:, :, ::2]
    assert not scattered.is_contiguous()
    window = window_of(geometry)
    expected, *others = (
        NATIVE.convolve(x, each, None, None, partition, window, "none")
        for each in (weight, moved, scattered)
    )
    for other in others:
        assert torch.equal(expected, other)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("name", ["in order, even", "few channels each", "odd, full lanes"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 13)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_sum_and_residual_are_rounded_once(
    kernel: int, size: tuple[int, int], name: str, layout: str
) -> None:
    """1 + 1/256 lies half-way between two numbers; what is added afterwards decides."""
    partition, pad = PARTITIONS[name], kernel // 2
    geometry = Geometry(size, (kernel, kernel), padding=(pad, pad, pad, pad))
    first = [inputs[0] for inputs in partition.inputs]
    second = [inputs[1] for inputs in partition.inputs]
    x = torch.zeros(2, partition.in_channels, *size, dtype=torch.bfloat16)
    x[:, first], x[:, second] = 1, 1 / 256
    weight = torch.zeros(partition.entries, kernel, kernel, dtype=torch.bfloat16)
    weight[:, pad, pad] = 1
    residual = torch.full((2, partition.out_channels, *size), 2**-12, dtype=torch.bfloat16)
    window = window_of(geometry)
    y = NATIVE.convolve(
        LAYOUTS[layout](x), weight, None, LAYOUTS[layout](residual), partition, window, "none"
    )
    written = [channel for outputs in partition.outputs for channel in outputs]
    assert (y[:, written] == 1 + 1 / 128).all()


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("geometry", [GEOMETRIES["3×3"], Geometry((9, 13))], ids=str)
def test_the_same_bits_on_any_number_of_threads(geometry: Geometry, layout: str) -> None:
    partition = PARTITIONS["odd, full lanes"]
    x, weight, _ = tensors(partition, geometry, 3, torch.bfloat16)
    x = LAYOUTS[layout](x)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = (x.clone().requires_grad_(), weight.clone().requires_grad_())
            y = NATIVE.convolve(*inputs, None, None, partition, window_of(geometry), "none")
            results.append((y, *torch.autograd.grad(y, inputs, y.detach())))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_a_denormal_counts_as_zero(layout: str) -> None:
    """Which also shows that the instruction is used: widened kernels keep denormals."""
    partition = Partition.random(32, 32, 2, seed=0)
    x = LAYOUTS[layout](torch.full((1, 32, 8, 8), TINY, dtype=torch.bfloat16))
    weight = torch.ones(partition.entries, 1, 1, dtype=torch.bfloat16)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        window = window_of(Geometry((8, 8)))
        return NATIVE.convolve(x, weight, None, None, partition, window, "none")

    def passes() -> tuple[torch.Tensor, ...]:
        ones = torch.ones_like(x).requires_grad_()
        return convolve(x), *torch.autograd.grad(convolve(ones), ones, x)

    for result in passes():
        assert (result == 0).all()
    with forced_isa("avx512"):
        for result in passes():
            assert (result > 0).all()


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("strange", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["odd counts", "few channels each"])
def test_groups_do_not_meet(name: str, layout: str, strange: float) -> None:
    """Zero weights would not keep what another group reads away: ∞ · 0 is NaN."""
    partition = PARTITIONS[name]
    for geometry in (Geometry((9, 13)), Geometry((8, 11), (3, 3), padding=AROUND)):
        x, weight, _ = tensors(partition, geometry, dtype=torch.bfloat16)
        window = window_of(geometry)
        for group in range(partition.groups):
            infected = x.clone()
            infected[:, list(partition.inputs[group])] = strange
            infected = LAYOUTS[layout](infected).requires_grad_()
            y = NATIVE.convolve(infected, weight, None, None, partition, window, "none")
            grad = torch.zeros_like(y)
            grad[:, list(partition.outputs[group])] = strange
            (input_grad,) = torch.autograd.grad(y, infected, grad)
            for result, lists in ((y, partition.outputs), (input_grad, partition.inputs)):
                for other in range(partition.groups):
                    seen = result[:, list(lists[other])].isfinite()
                    assert not seen.any() if other == group else seen.all()


def test_doctor_says_whether_it_pays_here(paired: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GROUPCONV_ISA"}
    command = [sys.executable, "-c", "from groupconv_ext.doctor import doctor; print(doctor())"]
    report = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    (chosen,) = (line for line in report.splitlines() if "instruction set" in line)
    best = PAIRED[-1]
    assert f"{best}: the best" in chosen or f"{best} runs too, but" in chosen
    assert f"{paired}: asked for by force_isa" in doctor()
