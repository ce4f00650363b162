"""Partition: what it means, how it is chosen, what it refuses, and where it can be used."""

import contextlib
import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PARTITIONS, partitions
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from groupconv_ext.partition import Partition, kronecker_radices

each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())

CPU = torch.device("cpu")
HUGE = 2**31


def slow_mask(partition: Partition) -> torch.Tensor:
    mask = torch.zeros(partition.out_channels, partition.in_channels, dtype=torch.bool)
    for inputs, outputs in zip(partition.inputs, partition.outputs, strict=True):
        for n, c in itertools.product(outputs, inputs):
            mask[n, c] = True
    return mask


def slow_pack(partition: Partition, dense: torch.Tensor) -> torch.Tensor:
    entries = [
        dense[n, c]
        for inputs, outputs in zip(partition.inputs, partition.outputs, strict=True)
        for n, c in itertools.product(outputs, inputs)
    ]
    return torch.stack(entries) if entries else dense.new_zeros(0, *dense.shape[2:])


# ---- what it says about itself ------------------------------------------------------------------


def test_attributes() -> None:
    p = Partition(7, 5, [(0, 3, 5), (), (3, 1), (2,)], [(4, 0), (2,), (1, 3), ()])
    assert (p.in_channels, p.out_channels, p.groups) == (7, 5, 4)
    assert p.inputs == ((0, 3, 5), (), (3, 1), (2,))
    assert p.outputs == ((4, 0), (2,), (1, 3), ())
    assert p.sizes == ((2, 3), (1, 0), (2, 2), (0, 1))
    assert p.entries == 10
    assert (p.is_even, p.is_contiguous, p.has_overlap) == (False, False, True)


@pytest.mark.parametrize(
    ("partition", "even", "contiguous", "overlap"),
    [
        (Partition.contiguous(8, 12, 4), True, True, False),
        (Partition.shuffled(8, 12, 4), True, False, False),
        (Partition(5, 3, [[0, 1], [2, 3, 4]], [[0], [1, 2]]), False, True, False),
        (Partition(5, 3, [[0, 1], [2, 3]], [[0], [1, 2]]), False, False, False),
        (Partition(3, 2, [[0, 1], [1, 2]], [[0], [1]]), True, False, True),
        (Partition(2, 2, [[0], [1]], [[1], [0]]), True, False, False),
    ],
)
def test_kinds(partition: Partition, even: bool, contiguous: bool, overlap: bool) -> None:
    actual = (partition.is_even, partition.is_contiguous, partition.has_overlap)
    assert actual == (even, contiguous, overlap)


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        (Partition.contiguous(6, 4, 1), "Partition(6→4, 1 group, even 4×6)"),
        (Partition.contiguous(256, 256, 8), "Partition(256→256, 8 groups, even 32×32)"),
        (
            Partition.random(256, 256, 8, seed=0),
            "Partition(256→256, 8 groups, even 32×32, permuted)",
        ),
        (
            Partition(12, 10, [range(5), [], range(5, 12)], [range(4), range(4, 7), range(7, 10)]),
            "Partition(12→10, 3 groups, ragged 4×5 3×0 3×7)",
        ),
        (
            Partition(4, 2, [[0, 1], [1, 2]], [[0], [1]]),
            "Partition(4→2, 2 groups, even 1×2, overlapping inputs, 1 unread)",
        ),
        (
            Partition(9, 9, [[g] for g in range(9)], [[], [1, 0], *([g] for g in range(2, 9))]),
            "Partition(9→9, 9 groups, ragged 0×1 2×1 1×1 1×1 1×1 1×1 1×1 1×1 …, permuted)",
        ),
    ],
)
def test_repr(partition: Partition, text: str) -> None:
    assert repr(partition) == text


def test_is_a_value() -> None:
    p, same = (Partition.random(12, 8, 4, seed=3) for _ in range(2))
    assert p == same
    assert hash(p) == hash(same)
    assert len({p, same}) == 1
    swapped = Partition(12, 8, p.inputs[::-1], p.outputs[::-1])
    assert p != swapped, "the order of the groups is the order of the packed weight"
    wider = Partition(13, 8, p.inputs, p.outputs)
    assert p != wider
    assert p != (p.in_channels, p.out_channels, p.inputs, p.outputs)


def pickled(partition: Partition) -> Partition:
    copied: Partition = pickle.loads(pickle.dumps(partition))
    return copied


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
@each_partition
def test_copies_carry_the_four_fields_only(
    partition: Partition, duplicate: Callable[[Partition], Partition]
) -> None:
    fresh = pickle.dumps(partition)
    partition.mask()
    assert pickle.dumps(partition) == fresh, "a filled cache must not travel"
    other = duplicate(partition)
    assert other == partition
    assert torch.equal(other.cpu_table, partition.cpu_table)


def test_is_immutable() -> None:
    p = Partition.contiguous(4, 4, 2)
    with pytest.raises(AttributeError, match="cannot set 'groups': a Partition is immutable"):
        p.groups = 3
    with pytest.raises(AttributeError, match="cannot delete 'inputs'"):
        del p.inputs
    lists = [[0, 1], [2, 3]]
    p = Partition(4, 2, lists, [[0], [1]])
    lists[0][0] = 3
    assert p.inputs == ((0, 1), (2, 3))


# ---- the ways of choosing one -------------------------------------------------------------------


@pytest.mark.parametrize(("ins", "outs", "groups"), [(8, 12, 4), (6, 6, 6), (3, 6, 3), (5, 2, 1)])
def test_contiguous_and_shuffled_are_pytorchs(ins: int, outs: int, groups: int) -> None:
    weight = torch.randn(outs, ins // groups, 3, 2, dtype=torch.float64)
    x = torch.randn(2, ins, 5, 4, dtype=torch.float64)
    y = functional.conv2d(x, weight, groups=groups)
    contiguous = Partition.contiguous(ins, outs, groups)
    torch.testing.assert_close(functional.conv2d(x, contiguous.unpack(weight)), y)
    shuffled = Partition.shuffled(ins, outs, groups)
    shuffled_y = functional.channel_shuffle(y, groups)
    torch.testing.assert_close(functional.conv2d(x, shuffled.unpack(weight)), shuffled_y)


def test_interleaved() -> None:
    p = Partition.interleaved(12, 8, 4)
    n, c = torch.arange(8)[:, None], torch.arange(12)
    assert torch.equal(p.mask(), n % 4 == c % 4)
    assert p.inputs[1] == (1, 5, 9)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, np.float32, torch.Tensor])
def test_from_labels(make: Callable[[list[int]], Any]) -> None:
    in_labels, out_labels = [2, 0, 2, 2, 0], [2, 3, 0, 2]
    p = Partition.from_labels(make(in_labels), make(out_labels), 4)
    assert p.inputs == ((1, 4), (), (0, 2, 3), ())
    assert p.outputs == ((2,), (), (0, 3), (1,))


def test_from_labels_takes_what_training_has() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    labels = logits.argmax(1)
    p = Partition.from_labels(labels, labels.to(torch.uint8), 3)
    assert torch.equal(p.mask(), labels[:, None] == labels)


@given(partitions())
def test_from_lists_takes_arrays_and_tensors(partition: Partition) -> None:
    p = Partition.from_lists(
        [np.array(group, np.int32) for group in partition.inputs],
        [torch.tensor(group) for group in partition.outputs],
        in_channels=partition.in_channels,
        out_channels=partition.out_channels,
    )
    assert p == partition
    assert all(type(c) is int for c in itertools.chain(*p.inputs, *p.outputs))


@pytest.mark.parametrize(
    ("ins", "outs", "radices"),
    [
        (8, 8, (2, 2, 2)),
        (12, 12, (2, 2, 3)),
        (12, 18, (2, 3)),
        (15, 30, (3, 5)),
        (7, 14, (7,)),
        (4, 9, ()),
        (1, 6, ()),
    ],
)
def test_kronecker_is_the_kronecker_product(ins: int, outs: int, radices: tuple[int, ...]) -> None:
    assert kronecker_radices(ins, outs) == radices
    gcd = math.gcd(ins, outs)
    for gates in itertools.product([0, 1], repeat=len(radices)):
        u = torch.ones(1, 1, dtype=torch.bool)
        for gate, radix in zip(gates, radices, strict=True):
            factor = torch.ones(radix, radix) if gate else torch.eye(radix)
            u = torch.kron(u, factor.bool())
        u = torch.kron(u, torch.ones(outs // gcd, ins // gcd, dtype=torch.bool))
        p = Partition.kronecker(gates, ins, outs)
        assert torch.equal(p.mask(), u)
        closed = [r for gate, r in zip(gates, radices, strict=True) if not gate]
        assert p.groups == math.prod(closed)
        assert p.is_even


def test_kronecker_for_powers_of_two_is_a_xor() -> None:
    gates = [1, 0, 0, 1]
    i = torch.arange(16)
    expected = (i[:, None] ^ i) & 0b0110 == 0  # gate 0 is the highest bit
    assert torch.equal(Partition.kronecker(gates, 16, 16).mask(), expected)


@pytest.mark.parametrize("gates", [[True, False], torch.tensor([True, False]), np.array([1.0, 0])])
def test_kronecker_gates_of_any_type(gates: Any) -> None:
    assert Partition.kronecker(gates, 4, 4) == Partition.kronecker([1, 0], 4, 4)


def test_random() -> None:
    p = Partition.random(24, 16, 4, seed=5)
    assert p == Partition.random(24, 16, 4, seed=5)
    assert p != Partition.random(24, 16, 4, seed=6)
    assert p.sizes == ((4, 6),) * 4
    assert not p.is_contiguous
    uneven = Partition.random(24, 15, 4, seed=5, uneven=True)
    assert uneven == Partition.random(24, 15, 4, seed=5, uneven=True)
    assert not uneven.is_even


@given(partitions())
def test_permutations_absorb_the_index_selects_around_a_convolution(partition: Partition) -> None:
    x = torch.randn(2, partition.in_channels, 1, 1, dtype=torch.float64)
    packed = torch.randn(partition.entries, 1, 1, dtype=torch.float64)
    order = torch.randperm(partition.in_channels)
    out_order = torch.randperm(partition.out_channels)

    def convolve(p: Partition, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, p.unpack(packed))

    before, after = partition.permute_inputs(order), partition.permute_outputs(out_order)
    y = convolve(partition, x)
    torch.testing.assert_close(convolve(before, x), convolve(partition, x[:, order]))
    torch.testing.assert_close(convolve(after, x), y[:, out_order])


# ---- weights ------------------------------------------------------------------------------------


@given(partitions())
def test_mask_and_pack_and_unpack(partition: Partition) -> None:
    mask = slow_mask(partition)
    assert torch.equal(partition.mask(), mask)
    assert torch.equal(partition.mask(torch.float32), mask.float())
    dense = torch.randn(partition.out_channels, partition.in_channels, 2, 3)
    packed = partition.pack(dense)
    assert torch.equal(packed, slow_pack(partition, dense))
    assert torch.equal(partition.unpack(packed), dense * mask[:, :, None, None])


@pytest.mark.parametrize("kernel", [(), (3,), (1, 3), (2, 2)])
@each_partition
def test_any_kernel_survives_the_round_trip(partition: Partition, kernel: tuple[int, ...]) -> None:
    packed = torch.randn(partition.entries, *kernel)
    dense = partition.unpack(packed)
    assert dense.shape == (partition.out_channels, partition.in_channels, *kernel)
    assert torch.equal(partition.pack(dense), packed)


@pytest.mark.parametrize("name", ["dense", "contiguous", "permuted", "depthwise", "multiplier"])
def test_unpack_takes_conv2d_weights_of_even_groups(name: str) -> None:
    partition = PARTITIONS[name]
    grouped = torch.randn(partition.out_channels, partition.sizes[0][1], 3, 3)
    expected = partition.unpack(grouped.flatten(0, 1))
    assert torch.equal(partition.unpack(grouped), expected)
    assert expected.shape == (partition.out_channels, partition.in_channels, 3, 3)


@each_partition
def test_pack_and_unpack_are_differentiable_twice(partition: Partition) -> None:
    dense = torch.randn(partition.out_channels, partition.in_channels, 2, dtype=torch.float64)
    packed = partition.pack(dense)
    for function, weight in ((partition.pack, dense), (partition.unpack, packed)):
        weight.requires_grad_()
        assert torch.autograd.gradcheck(function, weight)
        assert torch.autograd.gradgradcheck(lambda w, f=function: f(w) ** 2, weight)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float64])
def test_dtype_and_device_are_kept(dtype: torch.dtype) -> None:
    p = PARTITIONS["ragged"]
    assert p.mask(dtype, "meta").device.type == "meta"
    dense = p.mask(dtype)
    assert dense.dtype == dtype
    assert p.pack(dense).dtype == p.unpack(p.pack(dense)).dtype == dtype
    assert p.unpack(torch.empty(p.entries, 3, device="meta")).shape == (7, 9, 3)


# ---- the table ----------------------------------------------------------------------------------


@given(partitions())
def test_table_layout(partition: Partition) -> None:
    table = partition.cpu_table
    assert table.dtype == torch.int32
    assert table.dim() == 1
    rest = table.tolist()

    def take(count: int) -> list[int]:
        head = rest[:count]
        del rest[:count]
        return head

    in_channels, out_channels, groups, reads = take(4)
    in_offsets, out_offsets = take(groups + 1), take(groups + 1)
    inputs, outputs = take(reads), take(out_channels)
    assert not rest
    lists = tuple(
        tuple(tuple(flat[a:b]) for a, b in itertools.pairwise(offsets))
        for flat, offsets in ((inputs, in_offsets), (outputs, out_offsets))
    )
    assert Partition(in_channels, out_channels, *lists) == partition
    assert (in_offsets[0], in_offsets[-1]) == (0, reads)
    assert (out_offsets[0], out_offsets[-1]) == (0, out_channels)


@given(partitions())
def test_from_table_is_the_way_back(partition: Partition) -> None:
    assert Partition.from_table(partition.cpu_table) == partition
    assert Partition.from_table(partition.cpu_table.tolist()) == partition


@given(partitions(max_channels=5), st.data())
def test_a_damaged_table_is_refused_or_means_something(
    partition: Partition, data: st.DataObject
) -> None:
    table = partition.cpu_table.tolist()
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(table) - 1))
        table[position] = data.draw(st.integers(-20, 20) | st.just(HUGE))
    table = table[: data.draw(st.integers(0, len(table)))] + data.draw(st.lists(st.integers()))
    with contextlib.suppress(ValueError):
        assert Partition.from_table(table).cpu_table.tolist() == table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], r"table has 0 entries, beginning with \[\]; expected what Partition.table\(\)"),
        ([1, 1, 1, 1, 0, 1, 0, 1, 0], "table has 9 entries"),
        ([1, -20, 10, 0, 0, 0], r"beginning with \[1, -20, 10, 0\]"),
        ([1, 1, 10, -20, 0, 0, 0], r"beginning with \[1, 1, 10, -20\]"),
        ([1, 1, 1, 1, 1, 1, 0, 1, 0, 0], r"offsets \[1, 1\]; expected them to rise from 0 to 1"),
        ([1, 1, 2, 1, 0, 2, 1, 0, 1, 1, 0, 0], r"offsets \[0, 2, 1\]; .* from 0 to 1"),
        ([1, 1, 1, 1, 0, 1, 0, 1, 1, 0], r"inputs\[0\]\[0\] is 1"),
    ],
)
def test_from_table_refuses(table: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Partition.from_table(table)


@given(partitions())
def test_orders_around_a_standard_grouped_convolution(partition: Partition) -> None:
    read_order, write_order = partition.read_order("cpu"), partition.write_order("cpu")
    assert read_order.tolist() == list(itertools.chain(*partition.inputs))
    in_group_order = torch.tensor(list(itertools.chain(*partition.outputs)))
    assert in_group_order[write_order].tolist() == list(range(partition.out_channels))


def test_table_is_made_once_for_a_device() -> None:
    p = Partition.contiguous(4, 4, 2)
    assert p.table("cpu") is p.table(CPU) is p.cpu_table
    assert p.table("meta").shape == p.cpu_table.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_table_on_a_gpu() -> None:
    p = PARTITIONS["ragged"]
    table = p.table("cuda")
    assert table is p.table(table.device)
    assert torch.equal(table.cpu(), p.cpu_table)
    dense = torch.randn(7, 9, 2, device="cuda")
    assert torch.equal(p.unpack(p.pack(dense)), dense * p.mask(device="cuda")[..., None])


# ---- where it is made and used ------------------------------------------------------------------


def test_made_in_inference_mode_it_still_trains() -> None:
    with torch.inference_mode():
        p = Partition.random(6, 4, 2, seed=0)
        p.pack(torch.ones(4, 6))
    assert not p.cpu_table.is_inference()
    weight = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad((p.pack(weight) ** 2).sum(), weight)
    torch.testing.assert_close(grad, 2 * weight.detach() * p.mask())


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), FakeTensorMode])
def test_made_where_tensors_are_not_real_it_is_real(context: Callable[[], Any]) -> None:
    with context():
        p = Partition.random(6, 4, 2, seed=0)
    assert torch.equal(p.cpu_table, Partition.random(6, 4, 2, seed=0).cpu_table)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_first_use_inside_a_transform_leaves_nothing_behind(
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    p = Partition.random(6, 4, 2, seed=0)
    packed = torch.randn(p.entries)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (p.unpack(weight) ** 2).sum()

    batched = transform is torch.func.vmap
    inside = transform(loss)(packed[None] if batched else packed)
    torch.testing.assert_close(
        inside, 2 * packed if transform is torch.func.grad else loss(packed).expand(inside.shape)
    )
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(packed), (packed**2).sum())


def test_tables_of_fake_devices_do_not_outlive_their_mode() -> None:
    p = Partition.random(6, 4, 2, seed=0)
    modes = [FakeTensorMode(allow_non_fake_inputs=True) for _ in range(2)]
    for mode in modes:
        with mode:
            assert p.table("cuda:0").fake_mode is mode  # type: ignore[attr-defined]


class Layer(torch.nn.Module):
    """What a layer does with its partition."""

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self.partition = partition
        self.weight = torch.nn.Parameter(torch.randn(partition.entries))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.partition
        y = functional.linear(x, p.unpack(self.weight))
        return y + p.in_channels * p.table(x.device).sum() + sum(out for out, _ in p.sizes)


def test_torch_compile_takes_it_as_a_constant() -> None:
    p = Partition.random(6, 4, 2, seed=0)

    def use(dense: torch.Tensor) -> torch.Tensor:
        return p.pack(dense) * p.in_channels + p.cpu_table.sum() + len(p.inputs[0])

    dense = torch.randn(4, 6, requires_grad=True)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(use, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(dense), use(dense))
        (grad,) = torch.autograd.grad(compiled(dense).sum(), dense)
        torch.testing.assert_close(grad, 6.0 * p.mask())


def everything(p: Partition, packed: torch.Tensor) -> torch.Tensor:
    dense = p.unpack(packed)
    read, written = p.read_order(packed.device), p.write_order(packed.device)
    again = p.pack(dense.index_select(0, written)) * p.in_channels
    return again + dense.index_select(1, read).sum() + p.table(packed.device).sum() + p.mask().sum()


def test_compiled_code_does_not_mix_up_partitions_of_equal_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    packed = torch.randn(12)
    for seed in (0, 1, 2, 0):
        p = Partition.random(6, 4, 2, seed=seed)
        torch.testing.assert_close(compiled(p, packed), everything(p, packed))


def test_torch_compile_on_a_device_other_than_the_cpu() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    packed = torch.empty(12, device="meta")
    for seed in (0, 1):
        y = compiled(Partition.random(6, 4, 2, seed=seed), packed)
        assert (y.device, y.shape) == (packed.device, packed.shape)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict: bool) -> None:
    layer = Layer(Partition.random(6, 4, 2, seed=0))
    x = torch.randn(3, 6)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), layer(x))


# ---- bad input ----------------------------------------------------------------------------------

NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ((0, 4, 1), ValueError, "in_channels is 0; expected 1 ≤ in_channels"),
        ((4, -2, 1), ValueError, "out_channels is -2; expected 1 ≤"),
        ((4, 4, 0), ValueError, "groups is 0; expected 1 ≤"),
        ((4, 6, 4), ValueError, "groups = 4 does not divide out_channels = 6; for uneven groups"),
        ((6, 4, 4), ValueError, "groups = 4 does not divide in_channels = 6"),
        ((HUGE, 4, 1), ValueError, rf"in_channels is {HUGE}; expected .* ≤ 2³¹ − 1"),
        ((4, 4, HUGE), ValueError, f"groups is {HUGE}"),
        ((4.0, 4, 1), TypeError, "in_channels must be an int, got 4.0 of type float"),
        ((4, True, 1), TypeError, "out_channels must be an int, got True of type bool"),
        ((4, 4, "2"), TypeError, "groups must be an int, got '2' of type str"),
        ((None, 4, 2), TypeError, "in_channels must be an int, got None"),
    ],
)
@pytest.mark.parametrize("kind", ["contiguous", "interleaved", "shuffled", "random"])
def test_refuses_counts(kind: str, counts: Any, error: type[Exception], message: str) -> None:
    seed = {"seed": 0} if kind == "random" else {}
    with pytest.raises(error, match=message):
        getattr(Partition, kind)(*counts, **seed)


@pytest.mark.parametrize("counts", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (HUGE, 1, 1), (4, 4.0, 1)])
def test_refuses_counts_of_uneven_groups(counts: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"expected 1 ≤|must be an int"):
        Partition.random(*counts, seed=0, uneven=True)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 2], ValueError, r"labels\[2\] is 2; expected 0 ≤ label < groups = 2"),
        ([0, -1], ValueError, r"labels\[1\] is -1; expected 0 ≤"),
        ([0, NAN], ValueError, r"labels\[1\] is nan; expected a whole number"),
        (torch.tensor([0, NAN]), ValueError, r"labels\[1\] is nan"),
        (np.array([INF, 0]), ValueError, r"labels\[0\] is inf"),
        (torch.tensor([0.5], dtype=torch.bfloat16), ValueError, r"labels\[0\] is 0.5"),
        ([0, 10**30], ValueError, "labels holds an integer beyond 64 bits"),
        (torch.zeros(2, 2), ValueError, r"labels has shape \[2, 2\]; expected one dimension"),
        (np.int64(1), TypeError, "labels must be a list, .* of type int64"),
        ([], ValueError, "channels is 0; expected 1 ≤"),
        ([0, True], TypeError, r"labels\[1\] is True, a bool; expected an int"),
        (torch.tensor([True]), TypeError, r"labels\[0\] is True, a bool"),
        ([0, np.True_], TypeError, r"labels\[1\] is True, a bool"),
        (["0"], TypeError, r"labels\[0\] is '0' of type str; expected an int"),
        ([0, None], TypeError, r"labels\[1\] is None of type NoneType"),
        ([1j], TypeError, r"labels\[0\] is 1j of type complex"),
        ([[0, 1]], TypeError, r"labels\[0\] is \[0, 1\] of type list"),
        ("01", TypeError, "labels must be a list, .* got '01' of type str"),
        ({0, 1}, TypeError, "labels must be a list, .* of type set"),
    ],
)
def test_refuses_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"in_{message}"):
        Partition.from_labels(labels, [0], 2)
    with pytest.raises(error, match=f"out_{message}"):
        Partition.from_labels([0], labels, 2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "error", "message"),
    [
        ([[0, 3], []], [[0], [1]], ValueError, r"inputs\[0\]\[1\] is 3; .* < in_channels = 3"),
        ([[], [], [2, -1]], [[0], [], [1]], ValueError, r"inputs\[2\]\[1\] is -1; expected 0 ≤"),
        ([[0], [1]], [[0], [2]], ValueError, r"outputs\[1\]\[0\] is 2; .* < out_channels = 2"),
        ([[0], [1, 2, 1]], [[0], [1]], ValueError, r"inputs\[1\] reads channel 1 twice; expected"),
        ([[0], [1]], [[0, 1], [1]], ValueError, "outputs writes channel 1 twice; expected"),
        (
            [[0], [1]],
            [[0], []],
            ValueError,
            "outputs never writes channel 1; expected all of 0 … 1",
        ),
        ([[0], [1]], [[], [1]], ValueError, "outputs never writes channel 0"),
        ([[0], [1]], [[0, 1]], ValueError, "inputs has 2 lists and outputs has 1; expected one"),
        ([], [], ValueError, "groups is 0"),
        ([[0], [1.5]], [[0], [1]], ValueError, r"inputs\[1\]\[0\] is 1.5; expected a whole number"),
        ([[0], np.array([NAN])], [[0], [1]], ValueError, r"inputs\[1\]\[0\] is nan"),
        ([[0], [1]], [[0], [10**30]], ValueError, "outputs holds an integer beyond 64 bits"),
        ([[0], [1]], [[0], [True]], TypeError, r"outputs\[1\]\[0\] is True, a bool"),
        ([[0], "1"], [[0], [1]], TypeError, r"inputs\[1\] must be a list, .* got '1'"),
        ([0, 1], [[0], [1]], TypeError, r"inputs\[0\] is 0; expected a list of channels"),
        ([[0]], "ab", TypeError, "outputs is 'ab'; expected a list of channels for every group"),
        (5, [[0, 1]], TypeError, "inputs is 5; expected a list of channels for every group"),
    ],
)
def test_refuses_lists(inputs: Any, outputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Partition.from_lists(inputs, outputs, in_channels=3, out_channels=2)


def test_refuses_what_does_not_fit_before_building_it() -> None:
    half = range(HUGE // 2)
    with pytest.raises(
        ValueError, match=f"inputs lists {HUGE} channels in total; expected at most"
    ):
        Partition(HUGE // 2, 2, [half, half], [[0], [1]])
    with pytest.raises(ValueError, match="outputs never writes channel 1"):
        Partition(3, HUGE - 1, [[0]], [[0]])


def test_unread_channels_cost_nothing() -> None:
    p = Partition(HUGE - 1, 1, [[HUGE - 2]], [[0]])
    assert p.cpu_table.tolist() == [HUGE - 1, 1, 1, 1, 0, 1, 0, 1, HUGE - 2, 0]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([1, 0], r"gates has length 2; expected 3, one for each of the .* \(2, 2, 2\) of gcd"),
        ([1, 0, 2], r"gates\[2\] is 2; expected 0 or 1"),
        ([1, -1e-8, 1], r"gates\[1\] is -1e-08; expected 0 or 1 \(a learned, real gate g stands"),
        (torch.tensor([NAN, 1, 1]), r"gates\[0\] is nan; expected 0 or 1"),
    ],
)
def test_refuses_gates(gates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Partition.kronecker(gates, 8, 8)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 3], [0, 0, 2], [1, 2, 3], [-1, 0, 1]])
def test_refuses_what_is_no_permutation(order: list[int]) -> None:
    p = Partition.contiguous(3, 3, 1)
    message = f"order has {len(order)} entries and is not a permutation; .* 0 … 2 exactly once"
    for permute in (p.permute_inputs, p.permute_outputs):
        with pytest.raises(ValueError, match=message):
            permute(order)


@pytest.mark.parametrize("shape", [(5, 3), (3,), (), (3, 4, 5)])
def test_pack_refuses(shape: tuple[int, ...]) -> None:
    p = PARTITIONS["dense"]
    message = rf"shape {list(shape)}; expected [3, 5, *kernel] for Partition(5→3"
    with pytest.raises(ValueError, match=re.escape(message)):
        p.pack(torch.ones(shape))


@pytest.mark.parametrize("shape", [(14, 3, 3), (3, 4, 3, 3), (3,), ()])
def test_unpack_refuses(shape: tuple[int, ...]) -> None:
    message = f"shape {list(shape)}; expected [15, *kernel] or [3, 5, *kernel] for Partition(5→3"
    with pytest.raises(ValueError, match=re.escape(message)):
        PARTITIONS["dense"].unpack(torch.ones(shape))
    with pytest.raises(ValueError, match=r"expected \[19, \*kernel\] for Partition\(9→7"):
        PARTITIONS["ragged"].unpack(torch.ones(shape))
