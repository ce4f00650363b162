"""Mask products, packing and the gradients of learned groups, against plain PyTorch."""

import pytest
import torch
from helpers import (
    DTYPES,
    ISAS,
    PARTITIONS,
    assert_within_rounding,
    exact,
    forced_isa,
    needs_native,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import groupconv_ext as gc
from groupconv_ext import _ops, learned, masked, reference
from groupconv_ext.partition import Partition, kronecker_radices
from groupconv_ext.window import make_window

pytestmark = [needs_native, pytest.mark.native]

SHAPES = [
    (12, 10, 3, 1),
    (9, 16, 4, 3),
    (40, 33, 7, 2),
    (8, 8, 1, 1),
    (5, 6, 11, 3),
    (67, 130, 5, 1),
    (43, 20, 12, 2),
]
"""Outputs, inputs, groups and kernel; more groups than channels among them."""

CHANNELS = [(8, 8, 1), (16, 16, 3), (12, 24, 3), (36, 12, 1), (30, 30, 2), (5, 8, 3), (64, 128, 1)]
"""Outputs, inputs and kernel; powers of two, other primes, coprime ones."""


def flgc_operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outs, ins, groups, kernel = shape
    sizes = (outs, ins, kernel, kernel), (ins, groups), (outs, groups)
    weight, ins_logits, outs_logits = (torch.randn(size, dtype=dtype) for size in sizes)
    return weight.requires_grad_(), ins_logits.requires_grad_(), outs_logits.requires_grad_()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 40 * eps, "atol": 400 * eps}


# ---- the reference itself -----------------------------------------------------------------------


@pytest.mark.parametrize("winner", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_has_the_gradients_of_the_paper(
    shape: tuple[int, int, int, int], winner: bool
) -> None:
    weight, ins, outs = flgc_operands(shape)
    product = reference.flgc_weight(weight, ins, outs, "winner" if winner else "straight_through")
    s, t = ins.argmax(1), outs.argmax(1)
    mask = t[:, None] == s[None, :]
    assert torch.equal(product, weight * mask[:, :, None, None])
    d = torch.randn_like(product)
    grads = torch.autograd.grad(product, (weight, ins, outs), d)
    assert torch.equal(grads[0], d)
    by_mask = (d * weight).sum((2, 3))
    for logits, grad, labels, other, sums in (
        (ins, grads[1], s, t, by_mask.T),
        (outs, grads[2], t, s, by_mask),
    ):
        for row in range(len(labels)):
            hard = [sums[row][other == g].sum() for g in range(logits.shape[1])]
            hard = torch.stack(hard)
            if winner:
                hard = hard * (torch.arange(len(hard)) == labels[row])
            soft = logits[row].softmax(0)
            jacobian = torch.diag(soft) - torch.outer(soft, soft)
            torch.testing.assert_close(grad[row], jacobian @ hard)


@pytest.mark.parametrize(("outs", "ins", "kernel"), CHANNELS)
def test_the_reference_multiplies_by_the_kronecker_mask(outs: int, ins: int, kernel: int) -> None:
    weight = torch.randn(outs, ins, kernel, kernel, dtype=torch.float64)
    gates = torch.randn(len(kronecker_radices(ins, outs)), dtype=torch.float64)
    partition = Partition.kronecker((gates >= 0).int(), ins, outs)
    mask = partition.mask(torch.float64)[:, :, None, None]
    assert torch.equal(reference.dgconv_weight(weight, gates), weight * mask)


def test_a_gate_at_zero_counts_as_one() -> None:
    weight = torch.randn(4, 4, 1, 1)
    assert torch.equal(reference.dgconv_weight(weight, torch.zeros(2)), weight)
    assert torch.equal(gc.dgconv_weight(weight, torch.zeros(2)), weight)


# ---- FLGC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_gradient", ["straight_through", "masked"])
@pytest.mark.parametrize("gradient", ["straight_through", "winner"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flgc_weight(
    shape: tuple[int, int, int, int],
    gradient: str,
    weight_gradient: str,
    dtype: torch.dtype,
    isa: str,
) -> None:
    operands = flgc_operands(shape, dtype)
    options = {"gradient": gradient, "weight_gradient": weight_gradient}
    with forced_isa(isa):
        product = gc.flgc_weight(*operands, **options, backend="native")
        d = torch.randn_like(product)
        grads = torch.autograd.grad(product, operands, d)
    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = reference.flgc_weight(*wide, **options)
    assert torch.equal(product.double(), expected)
    exact = torch.autograd.grad(expected, wide, d.double())
    for grad, value in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.double(), value, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0, 1, 1], [2, 2, 2], [-1, -2, -1]], dtype=dtype)
    assert _ops.row_labels(logits, "logits").tolist() == [1, 0, 0]
    assert learned.flgc_partition(logits, logits).outputs == ((1, 2), (0,), ())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_and_gates_that_are_not_finite_are_refused(bad: float) -> None:
    weight, ins, outs = (t.detach() for t in flgc_operands((6, 4, 3, 1), torch.float32))
    ins[2, 1] = bad
    for backend in ("native", "dense"):
        with pytest.raises(ValueError, match=r"input_logits has (nan|-?inf) at \[2, 1\]"):
            gc.flgc_weight(weight, ins, outs, backend=backend)
        with pytest.raises(ValueError, match=r"gates has (nan|-?inf) at \[0\]"):
            gc.dgconv_weight(weight, torch.tensor([bad]), backend=backend)
    with pytest.raises(RuntimeError, match=r"layer\.logits has (nan|-?inf) in row 2"):
        _ops.row_labels(ins, "layer.logits")


def test_the_mask_covers_what_is_not_finite() -> None:
    weight = torch.full((2, 2, 1, 1), torch.nan)
    weight[0, 0] = weight[1, 1] = 1
    logits = torch.eye(2)
    assert torch.equal(gc.flgc_weight(weight, logits, logits).flatten(1), torch.eye(2))


# ---- DGConv -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outs", "ins", "kernel"), CHANNELS)
def test_dgconv_weight(outs: int, ins: int, kernel: int, dtype: torch.dtype, isa: str) -> None:
    for _ in range(4):
        weight = torch.randn(outs, ins, kernel, kernel, dtype=dtype, requires_grad=True)
        gates = torch.randn(len(kronecker_radices(ins, outs)), dtype=dtype, requires_grad=True)
        with forced_isa(isa):
            product = gc.dgconv_weight(weight, gates, backend="native")
            d = torch.randn_like(product)
            grads = torch.autograd.grad(product, (weight, gates), d)
        wide = [t.detach().double().requires_grad_() for t in (weight, gates)]
        expected = reference.dgconv_weight(*wide)
        assert torch.equal(product.double(), expected)
        exact = torch.autograd.grad(
            expected, wide, d.double(), allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(grads[0].double(), exact[0])
        # A sum of up to outs · ins · kernel² products of either sign.
        scale = tolerance(dtype)["atol"] * (outs * ins) ** 0.5 * kernel
        torch.testing.assert_close(grads[1].double(), exact[1], rtol=0.02, atol=scale)


def neighbours(partition: Partition, radices: tuple[int, ...], gates: list[int]) -> int:
    """Pairs that some gradient needs, counted one by one."""

    def digits(channel: int, stride: int) -> list[int]:
        found = []
        for radix, gate in zip(radices, gates, strict=True):
            stride //= radix
            if not gate:
                found.append(channel // stride % radix)
        return found

    return sum(
        sum(
            a != b
            for a, b in zip(
                digits(n, partition.out_channels), digits(c, partition.in_channels), strict=True
            )
        )
        <= 1
        for n in range(partition.out_channels)
        for c in range(partition.in_channels)
    )


@pytest.mark.parametrize("gates", [[0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
def test_the_blocks_that_gradients_need_are_few(gates: list[int]) -> None:
    partition = Partition.kronecker(gates, 12, 24)
    radices = kronecker_radices(12, 24)
    closed = [radix for radix, gate in zip(radices, gates, strict=True) if not gate]
    share = 1 + sum(radix - 1 for radix in closed)
    assert neighbours(partition, radices, gates) == partition.entries * share


# ---- convolutions -------------------------------------------------------------------------------

WINDOWS = {
    "1×1": (1, {}),
    "3×3": (3, {"padding": 1}),
    "strided": (3, {"padding": (1, 0), "stride": 2}),
    "dilated": (2, {"dilation": 2, "padding": "same"}),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", ["flgc", "dgconv"])
def test_convolution(method: str, window: str, channels_last: bool, isa: str) -> None:
    kernel, arguments = WINDOWS[window]
    outs, ins = 12, 18
    x = torch.randn(2, ins, 7, 6, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, *logits = flgc_operands((outs, ins, 4, kernel))
    bias = torch.randn(outs, dtype=torch.float64)
    gates = torch.tensor([1.0, -1.0], dtype=torch.float64)
    operands = [x.requires_grad_(), weight, bias.requires_grad_()]
    if method == "flgc":
        operands += logits
        function = gc.flgc_conv2d
    else:
        operands.append(gates.requires_grad_())
        function = gc.dgconv_conv2d
    with forced_isa(isa):
        y = function(*operands, **arguments, backend="native")
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, operands, dy)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last or window == "1×1"
    expected = function(*operands, **arguments, backend="dense")
    torch.testing.assert_close(y, expected)
    for grad, value in zip(grads, torch.autograd.grad(expected, operands, dy), strict=True):
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "mixed"])
@pytest.mark.parametrize(("ins", "outs", "size"), [(64, 64, 6), (100, 70, 13), (131, 65, 17)])
def test_the_dense_weight_gradient_as_a_product_of_matrices(
    ins: int, outs: int, size: int, layout: str, dtype: torch.dtype, isa: str
) -> None:
    x, grad = torch.randn(3, ins, size, size), torch.randn(3, outs, size, size)
    if layout != "NCHW":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    x, grad = x.to(dtype), grad.to(dtype)
    with forced_isa(isa):
        found = _ops.dense_conv2d_weight_grad(grad, x, 1, 1, *make_window(1, 1, 1, 0, 1))
    assert_within_rounding(found, exact(_products_of_matrices, grad, x))


def _products_of_matrices(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bnhw,bchw->nc", grad, x)[:, :, None, None]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [3, 8])
@pytest.mark.parametrize("size", [6, 21])
def test_the_weight_gradient_of_wide_groups_as_products_of_matrices(
    size: int, groups: int, dtype: torch.dtype, isa: str
) -> None:
    """Groups that fill no tile, blocks of pixels that fill no L1, with and without slices."""
    ins, outs = (torch.randint(33, 70, (groups,)) for _ in range(2))
    labels = [torch.arange(groups).repeat_interleave(counts) for counts in (ins, outs)]
    partition = Partition.from_labels(*(side[torch.randperm(len(side))] for side in labels), groups)
    x = torch.randn(4, partition.in_channels, size, size).to(dtype)
    grad = torch.randn(4, partition.out_channels, size, size).to(dtype)
    window = make_window(1, 1, 1, 0, 1)
    with forced_isa(isa):
        found = _ops.conv2d_weight_grad(
            grad, x, partition.table(x.device), partition.entries, 1, 1, *window
        )
    packed = exact(lambda *sides: partition.pack(_products_of_matrices(*sides)), grad, x)
    assert_within_rounding(found, packed)


# ---- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (2,)], ids=str)
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_pack(partition: Partition, kernel: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    shape = partition.out_channels, partition.in_channels, *kernel
    dense = torch.randn(shape, dtype=dtype, requires_grad=True)
    with forced_isa(isa):
        packed = masked.pack(dense, partition)
        grad = torch.randn_like(packed)
        (back,) = torch.autograd.grad(packed, dense, grad)
    assert torch.equal(packed, partition.pack(dense))
    assert torch.equal(back, partition.unpack(grad.view(partition.entries, *kernel)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_pack_casts_on_the_way(kernel: int, isa: str) -> None:
    partition = Partition.random(24, 40, 4, seed=0, uneven=True)
    dense = torch.randn(40, 24, kernel, kernel, requires_grad=True)
    with forced_isa(isa):
        packed = masked.pack(dense, partition, torch.bfloat16)
        grad = torch.randn(packed.shape).bfloat16()
        (back,) = torch.autograd.grad(packed, dense, grad)
    assert torch.equal(packed, partition.pack(dense).bfloat16())
    assert back.dtype == torch.float32
    assert torch.equal(back, partition.unpack(grad.float()))


def test_pack_has_two_derivatives() -> None:
    partition = PARTITIONS["overlapping, unread"]
    dense = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: masked.pack(w, partition), dense)
    assert torch.autograd.gradgradcheck(lambda w: masked.pack(w, partition), dense)


# ---- the operations ------------------------------------------------------------------------------


def test_opcheck() -> None:
    weight, ins, outs = (t.detach() for t in flgc_operands((9, 8, 3, 3), torch.float32))
    s, t = _ops.row_labels(ins, ""), _ops.row_labels(outs, "")
    x, grad = torch.randn(2, 8, 5, 5), torch.randn(2, 9, 5, 5)
    window = make_window(3, 3, 1, 1, 1)
    ops = torch.ops.groupconv
    partition = Partition.from_labels(s, t, 3)
    gates, square = torch.randn(3), torch.randn(8, 8, 3, 3)
    calls = {
        ops.row_labels: (ins, "owner"),
        ops.kronecker_labels: (gates, 8, 8, "owner"),
        ops.mask_weight: (weight, s, t),
        ops.label_grad: (weight, weight, ins, outs, s, t, False, True),
        ops.kronecker_grad: (square, square, gates),
        ops.pack: (weight, partition.cpu_table, partition.entries, True),
        ops.unpack: (partition.pack(weight), partition.cpu_table, 9, 8, False),
        ops.labelled_conv2d: (x, weight, None, s, t, 3, *window),
        ops.labelled_conv2d_input_grad: (grad, weight, s, t, 3, 5, 5, *window, False),
        ops.labelled_conv2d_weight_grad: (grad, x, s, t, 3, 3, 3, *window),
        ops.dense_conv2d_weight_grad: (grad, x, 3, 3, *window),
        ops.kronecker_conv2d_grad: (x, x, square, gates, *window),
    }
    for op, arguments in calls.items():
        opcheck(op.default, arguments)


@given(
    labels=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4),
    groups=st.integers(-2, 2**31),
)
def test_hostile_labels_are_refused_or_computed(labels: list[int], groups: int) -> None:
    s = torch.tensor(labels, dtype=torch.int32)
    t = torch.zeros(3, dtype=torch.int32)
    fits = all(0 <= label < groups for label in labels) and groups >= 1
    if fits and max(labels) > 1000:
        return  # right, and as large a table as was asked for
    x, weight = torch.randn(1, 4, 2, 2), torch.randn(3, 4, 1, 1)
    window = make_window(1, 1, 1, 0, 1)
    if fits and groups < 2**31:
        y = _ops.labelled_conv2d(x, weight, None, s, t, groups, *window)
        assert y.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"expected 0|must be from"):
            _ops.labelled_conv2d(x, weight, None, s, t, groups, *window)


def test_wrong_operands_are_refused() -> None:
    weight, ins, outs = (t.detach() for t in flgc_operands((6, 4, 3, 1), torch.float32))
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(
        ValueError, match=r"input_logits has shape \[6, 3\]; expected \[4, groups\]"
    ):
        gc.flgc_conv2d(x, weight, None, outs, ins)
    with pytest.raises(ValueError, match="has 3 groups and output_logits 2"):
        gc.flgc_conv2d(x, weight, None, ins, outs[:, :2])
    with pytest.raises(ValueError, match="x has 6 channels; expected 4"):
        gc.flgc_conv2d(torch.randn(1, 6, 3, 3), weight, None, ins, outs)
    with pytest.raises(TypeError, match=r"use torch\.autocast"):
        gc.flgc_conv2d(x.bfloat16(), weight, None, ins, outs)
    with pytest.raises(ValueError, match="gradient is 'loser'"):
        gc.flgc_conv2d(x, weight, None, ins, outs, gradient="loser")
    with pytest.raises(ValueError, match=r"gates has shape \[2\]; expected \[1\]"):
        gc.dgconv_conv2d(x, weight, None, torch.zeros(2))
    with pytest.raises(RuntimeError, match="labels"):
        _ops.mask_weight(weight, torch.zeros(4), torch.zeros(6))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, ins, outs = flgc_operands((512, 600, 5, 1), torch.float32)
    x = torch.randn(4, 600, 12, 12)

    def compute(threads: int) -> tuple[torch.Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = gc.flgc_conv2d(x, weight, None, ins, outs)
            return y, *torch.autograd.grad(y.square().sum(), (weight, ins, outs))
        finally:
            torch.set_num_threads(before)

    for one, two in zip(compute(1), compute(2), strict=True):
        assert torch.equal(one, two)
