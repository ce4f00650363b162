"""Learned groups and chains by the CUDA kernels, run on the CPU: see test_cuda_on_cpu."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import CUDA_ON_CPU, DTYPES, assert_close
from helpers import needs_native

import groupconv_ext as gc
from groupconv_ext import Partition, reference

pytestmark = CUDA_ON_CPU

# ---- learned groups ------------------------------------------------------------------------------


def layer_and_gradients(
    layer: torch.nn.Module, x: torch.Tensor, backend: str
) -> list[torch.Tensor | None]:
    layer.backend = backend  # type: ignore[assignment]
    x = x.detach().requires_grad_()
    y = layer(x)
    operands = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y, operands, torch.cos(y.detach()), allow_unused=True)]


LEARNED: dict[str, Callable[[], torch.nn.Module]] = {
    "flgc": lambda: gc.nn.FLGConv2d(24, 40, 1, groups=5),
    "flgc, winner": lambda: gc.nn.FLGConv2d(24, 40, 1, groups=5, gradient="winner"),
    "flgc, masked": lambda: gc.nn.FLGConv2d(
        11, 14, 3, 2, 1, groups=3, weight_gradient="masked", bias=False
    ),
    "dgconv": lambda: gc.nn.DGConv2d(24, 36, 1),
    "dgconv, strided": lambda: gc.nn.DGConv2d(12, 30, 3, 2, 1),
    "dgconv, one factor": lambda: gc.nn.DGConv2d(5, 10, 1),
}


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_groups(name: str, frozen: bool) -> None:
    layer = LEARNED[name]().double()
    if isinstance(layer, gc.nn.DGConv2d):
        with torch.no_grad():
            layer.gates.copy_(torch.randn_like(layer.gates))
    if frozen:
        layer.freeze_structure()
    ins = layer.in_channels
    x = torch.randn(2, ins, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(
        layer_and_gradients(layer, x, "native"), layer_and_gradients(layer, x, "dense")
    )


def test_masked_products_and_packing(ops: Any) -> None:
    p = Partition.random(19, 23, 4, seed=11, uneven=True)
    dense = torch.randn(23, 19, 3)
    labels = [torch.empty(c, dtype=torch.int32) for c in (19, 23)]
    for side, label in zip((p.inputs, p.outputs), labels, strict=True):
        for group, channels in enumerate(side):
            label[list(channels)] = group
    assert torch.equal(ops.mask_weight(dense, *labels), dense * p.mask()[..., None])
    packed = ops.pack(dense, p.cpu_table, p.entries, False)
    assert torch.equal(packed, p.pack(dense))
    assert torch.equal(ops.unpack(packed, p.cpu_table, 23, 19, False), p.unpack(packed))
    narrow = ops.pack(dense, p.cpu_table, p.entries, True)
    assert torch.equal(narrow, packed.bfloat16())
    assert torch.equal(ops.unpack(narrow, p.cpu_table, 23, 19, True), p.unpack(narrow.float()))
    weight = torch.randn(23, 19, 1, 1)
    x, grad = torch.randn(2, 19, 4, 5), torch.randn(2, 23, 4, 5)
    pointwise = (1, 1, 0, 0, 0, 0, 1, 1)
    found = ops.labelled_conv2d(x.half(), weight, None, *labels, 4, *pointwise)
    expected = reference.conv2d(x.half().double(), p.pack(weight.half().double()), None, p)
    assert_close(found, expected, torch.float16)
    found = ops.labelled_conv2d_weight_grad(grad, x, *labels, 4, 1, 1, *pointwise)
    by_weight = ops.conv2d_weight_grad(grad, x, p.cpu_table, p.entries, 1, 1, *pointwise)
    torch.testing.assert_close(found, p.unpack(by_weight))


def test_what_no_label_can_be_becomes_nan(ops: Any) -> None:
    """The device finds it after the call; there is nobody left to raise to."""
    logits = torch.randn(6, 3)
    assert torch.equal(ops.row_labels(logits, "x"), logits.argmax(1).int())
    logits[2, 1] = torch.inf
    labels = ops.row_labels(logits, "x")
    assert labels[2] == -1
    x, weight, pointwise = (
        torch.randn(1, 6, 2, 2),
        torch.randn(6, 6, 1, 1),
        (1, 1, 0, 0, 0, 0, 1, 1),
    )
    sound = torch.zeros(6, dtype=torch.int32)
    for pair in ((labels, sound), (sound, labels), (sound, sound + 3)):
        assert ops.labelled_conv2d(x, weight, None, *pair, 3, *pointwise).isnan().all()
        found = ops.label_grad(
            weight, weight, torch.randn(6, 3), torch.randn(6, 3), *pair, False, False
        )
        assert all(g.isnan().all() for g in found[1:])
    ins, outs = ops.kronecker_labels(torch.tensor([1.0, torch.nan]), 6, 6, "x")
    assert (ins == -1).all()
    assert (outs == -1).all()
    assert ops.kronecker_grad(weight, weight, torch.tensor([1.0, torch.nan]))[1].isnan().all()


# ---- chains --------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("in_their_place")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_chain(activation: str | None, channels_last: bool) -> None:
    partitions = [
        Partition.random(24, 40, 4, seed=1),
        wide_overlap_to(40, 33),
        Partition.random(33, 22, 11, seed=3),
    ]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 24, 7, 11, dtype=torch.float64).contiguous(memory_format=layout)
    weights = [torch.randn(p.entries, 1, 1, dtype=torch.float64) for p in partitions]
    bias = torch.randn(22, dtype=torch.float64)
    operands = [t.requires_grad_() for t in (x, bias, *weights)]

    def run(backend: str) -> list[torch.Tensor]:
        y = gc.chain(
            x, weights, bias, partitions=partitions, activation=activation, backend=backend
        )
        return [y, *torch.autograd.grad(y, operands, torch.cos(y.detach()))]

    torch.testing.assert_close(run("native"), run("reference"))


def wide_overlap_to(ins: int, outs: int) -> Partition:
    """Overlapping inputs of which some are in no group."""
    inputs = [list(range(ins - 9)), list(range(ins // 2, ins - 3)), []]
    outputs = [list(range(0, outs, 2)), list(range(1, outs - 4, 2)), list(range(outs - 3, outs, 2))]
    outputs[2] = sorted(set(range(outs)) - set(outputs[0]) - set(outputs[1]))
    return Partition.from_lists(inputs, outputs, in_channels=ins, out_channels=outs)


def test_chain_of_the_wrong_tables(ops: Any) -> None:
    first, last = Partition.random(8, 12, 2, seed=1), Partition.random(12, 6, 3, seed=2)
    x = torch.randn(1, 8, 3, 3)
    weights = [torch.randn(p.entries, 1, 1) for p in (first, last)]
    tables = [p.cpu_table.clone() for p in (first, last)]
    assert ops.chain(x, weights, None, tables, 6, 0).isfinite().all()
    grad, entries = torch.randn(1, 6, 3, 3), first.entries + last.entries
    for table, place, value in (
        (0, 1, 11),
        (0, 1, 2**31 - 1),
        (1, 0, 13),
        (1, 20, 12),
        (0, 20, -1),
    ):
        hostile = [t.clone() for t in tables]
        hostile[table][place] = value
        assert ops.chain(x, weights, None, hostile, 6, 0).isnan().all()
        found = ops.chain_grad(grad, x, weights, hostile, entries, True, True)
        assert all(g.isnan().all() for g in found)
    with pytest.raises(RuntimeError, match="up to 8 stages, got 9"):
        ops.chain(x, weights * 4 + weights[:1], None, tables * 4 + tables[:1], 6, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chain_of_many_channels(ops: Any, dtype: torch.dtype) -> None:
    """A tile of few pixels, in every dtype."""
    partitions = [Partition.random(512, 512, 64, seed=s) for s in range(2)]
    x = torch.randn(1, 512, 3, 5).to(dtype)
    weights = [torch.randn(p.entries, 1, 1).to(dtype) for p in partitions]
    y = ops.chain(x, weights, None, [p.cpu_table for p in partitions], 512, 0)
    expected = x.double()
    for weight, partition in zip(weights, partitions, strict=True):
        expected = reference.conv2d(expected, weight.double(), None, partition)
    assert_close(y, expected, dtype)
