"""gc.chain: all stages in one pass, equal to the stages one after another, forward and back."""

import pytest
import torch
from helpers import CHAINS, DTYPES, ISAS, LAYOUTS, assert_within_rounding, exact, forced_isa

import groupconv_ext as gc
from groupconv_ext import Partition, _ops, reference
from groupconv_ext._layout import is_channels_last
from groupconv_ext.backends import BackendError

SIZES = [(2, 5, 6), (1, 1, 1), (3, 20, 29), (1, 40, 64)]


def operands(
    partitions: list[Partition], size: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    batch, *image = size
    x = torch.randn(batch, partitions[0].in_channels, *image, dtype=dtype)
    weights = [torch.randn(p.entries, 1, 1, dtype=dtype) for p in partitions]
    return x, weights, torch.randn(partitions[-1].out_channels, dtype=dtype)


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_stages(name: str, size: tuple[int, int, int], isa: str) -> None:
    partitions = CHAINS[name]
    x, weights, bias = operands(partitions, size)
    for layout in ("NCHW", "channels_last"):
        for activation in (None, "relu", "relu6", "silu"):
            leaves = [t.detach().requires_grad_() for t in (LAYOUTS[layout](x), bias, *weights)]
            with forced_isa(isa):
                y = gc.chain(
                    leaves[0], leaves[2:], leaves[1], partitions=partitions, activation=activation
                )
                grad = torch.randn_like(y)
                actual = torch.autograd.grad(y, leaves, grad)
            expected = reference.chain(leaves[0], leaves[2:], leaves[1], partitions, activation)
            torch.testing.assert_close(y, expected)
            wanted = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
            for a, w in zip(actual, wanted, strict=True):
                torch.testing.assert_close(a, torch.zeros_like(a) if w is None else w)


@pytest.mark.native
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if "expanded" not in n])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    partitions = CHAINS["three stages, ragged"][:1]  # one stage is linear, so its errors are known
    x, weights, _ = operands(partitions, (3, 7, 9), dtype)
    x = LAYOUTS[layout](x)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.conv2d(x, weight, None, partitions[0])

    y = gc.chain(x, weights, partitions=partitions)
    assert_within_rounding(y, exact(linear, x, weights[0]))
    assert is_channels_last(y) == is_channels_last(x)


@pytest.mark.native
def test_float32_and_bfloat16_train() -> None:
    partitions = CHAINS["in place"]
    x, weights, bias = operands(partitions, (2, 16, 16))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias, *weights)]
        double = [t.detach().double().requires_grad_() for t in leaves]
        y = gc.chain(leaves[0], leaves[2:], leaves[1], partitions=partitions)
        expected = reference.chain(double[0], double[2:], double[1], partitions)
        grad = torch.randn_like(y)
        actual = torch.autograd.grad(y, leaves, grad)
        for a, w in zip(
            (y, *actual), (expected, *torch.autograd.grad(expected, double, grad.double())),
            strict=True,
        ):  # fmt: skip
            assert a.dtype == dtype
            bound = tolerance * float(w.detach().abs().max())
            torch.testing.assert_close(a.double(), w, rtol=tolerance, atol=bound)


@pytest.mark.native
def test_the_same_bits_on_any_number_of_threads() -> None:
    partitions = [Partition.contiguous(64, 64, 8), Partition.interleaved(64, 64, 8)]
    x, weights, bias = operands(partitions, (3, 40, 41), torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        y = gc.chain(leaves[0], leaves[1:], bias, partitions=partitions)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_gradients() -> None:
    partitions = [Partition.contiguous(4, 4, 2), Partition.interleaved(4, 4, 2)]
    x, weights, bias = operands(partitions, (2, 2, 3))
    leaves = [t.requires_grad_() for t in (x, bias, *weights)]

    def run(x: torch.Tensor, bias: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return gc.chain(x, weights, bias, partitions=partitions)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_only_what_is_asked_for_is_computed() -> None:
    partitions = CHAINS["in place"]
    x, weights, _ = operands(partitions, (1, 3, 3))
    first, second = weights[0].requires_grad_(), weights[1]
    y = gc.chain(x, [first, second], partitions=partitions)
    (grad,) = torch.autograd.grad(y.sum(), first)
    (expected,) = torch.autograd.grad(reference.chain(x, weights, None, partitions).sum(), first)
    torch.testing.assert_close(grad, expected)


def test_opcheck_and_compile() -> None:
    partitions = CHAINS["three stages, ragged"]
    x, weights, bias = operands(partitions, (2, 4, 5), torch.float32)
    tables = [p.cpu_table for p in partitions]
    if _ops.unavailable is None:
        torch.library.opcheck(torch.ops.groupconv.chain.default, (x, weights, bias, tables, 6, 1))
        grad = torch.randn(2, 6, 4, 5)
        entries = sum(p.entries for p in partitions)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.groupconv.chain_grad.default,
                (grad, x, weights, tables, entries, *needs),
            )
    leaves = [t.requires_grad_() for t in (x, *weights)]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return gc.chain(x, weights, bias, partitions=partitions, activation="relu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(run(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_vmap() -> None:
    partitions = CHAINS["in place"]
    x, weights, _ = operands(partitions, (2, 3, 4))
    xs = torch.stack([x, 2 * x])
    y = torch.vmap(lambda x: gc.chain(x, weights, partitions=partitions))(xs)
    torch.testing.assert_close(y[1], 2 * gc.chain(x, weights, partitions=partitions))
    scaled = torch.vmap(lambda w: gc.chain(x, [w, weights[1]], partitions=partitions))(
        torch.stack([weights[0], 3 * weights[0]])
    )
    torch.testing.assert_close(scaled[1], 3 * scaled[0])


@pytest.mark.parametrize("backend", ["native", "aten", "dense", "reference"])
def test_every_backend(backend: str) -> None:
    partitions = CHAINS["three stages, ragged"]
    x, weights, bias = operands(partitions, (2, 4, 5))
    expected = reference.chain(x, weights, bias, partitions, "relu")
    y = gc.chain(x, weights, bias, partitions=partitions, activation="relu", backend=backend)
    torch.testing.assert_close(y, expected)
    options = {"partitions": partitions, "activation": "relu", "backend": backend}
    torch.testing.assert_close(gc.chain(x[0], weights, bias, **options), expected[0])


def test_autocast_and_meta() -> None:
    partitions = CHAINS["in place"]
    x, weights, bias = operands(partitions, (2, 4, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gc.chain(x, weights, bias, partitions=partitions)
    assert y.dtype == torch.bfloat16
    expected = reference.chain(x, weights, bias, partitions)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.2)
    meta = gc.chain(x.to("meta"), [w.to("meta") for w in weights], partitions=partitions)
    assert meta.shape == y.shape
    assert meta.is_meta


def test_bad_input() -> None:
    a, b = Partition.contiguous(8, 12, 4), Partition.contiguous(12, 6, 2)
    x, weights, bias = operands([a, b], (1, 3, 3))
    first, second = weights
    large = torch.zeros(24, 3, 3)
    cases = [
        (TypeError, "x is None", {"x": None}),
        (ValueError, r"x has shape \[8\]", {"x": torch.zeros(8)}),
        (ValueError, r"\[0\] reads 8 channels and x has 9", {"x": torch.zeros(1, 9, 2, 2)}),
        (ValueError, r"\[1\] reads 8 channels and stage 0 writes 12", {"partitions": [a, a]}),
        (ValueError, "2 weights and 1 partitions", {"partitions": [a]}),
        (ValueError, "0 weights and 0 partitions", {"partitions": [], "weights": []}),
        (TypeError, r"weights\[1\] is 3", {"weights": [first, 3]}),
        (TypeError, r"partitions\[1\] is 'b'", {"partitions": [a, "b"]}),
        (ValueError, r"weights\[0\] has shape \[24, 3, 3\]", {"weights": [large, second]}),
        (TypeError, r"weights\[1\] is torch.float32", {"weights": [first, second.float()]}),
        (ValueError, r"bias has shape \[5\]; expected \[6\]", {"bias": torch.zeros(5).double()}),
        (ValueError, "activation is 'gelu'", {"activation": "gelu"}),
        (ValueError, "backend is 'fast'", {"backend": "fast"}),
    ]
    for error, message, change in cases:
        given = {"x": x, "weights": weights, "bias": bias, "partitions": [a, b]} | change
        with pytest.raises(error, match=message):
            gc.chain(given.pop("x"), given.pop("weights"), given.pop("bias"), **given)
    half = [w.half() for w in weights]
    with pytest.raises(BackendError, match="float16"):
        gc.chain(x.half(), half, partitions=[a, b], backend="native")


@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
def test_the_raw_operation_refuses_what_does_not_fit() -> None:
    a, b = Partition.contiguous(8, 12, 4), Partition.contiguous(12, 6, 2)
    x, weights, _ = operands([a, b], (1, 3, 3))
    tables = [a.cpu_table, b.cpu_table]
    hostile = a.cpu_table.clone()
    hostile[-1] = 99
    boundless = a.cpu_table.clone()
    boundless[1] = 2**31 - 1
    header = a.cpu_table[:1].clone()
    for message, arguments in {
        "8 input and 12 output channels, the operands have 12 and 12": (
            x,
            [weights[0], weights[0]],
            None,
            [tables[0]] * 2,
            12,
            0,
        ),
        "at least one stage, got 0": (x, [], None, [], 6, 0),
        "got 2 weights and 1 tables": (x, weights, None, tables[:1], 12, 0),
        "length 34 does not fit its header": (x, weights, None, [boundless, tables[1]], 6, 0),
        "shorter than its header": (x, weights, None, [header, tables[1]], 6, 0),
        "1-d int32 tensor": (x, weights, None, [tables[0].long(), tables[1]], 6, 0),
        "output channel": (x, weights, None, [hostile, tables[1]], 6, 0),
        "12 input and 6 output channels, the operands have 12 and 7": (
            x,
            weights,
            None,
            tables,
            7,
            0,
        ),
        "1×1 window": (x, [torch.zeros(24, 3, 3).double(), weights[1]], None, tables, 6, 0),
        "another dtype": (x, [weights[0].float(), weights[1]], None, tables, 6, 0),
        "activation must be": (x, weights, None, tables, 6, 9),
        "the operands have 9 and 12": (
            torch.zeros(1, 9, 2, 2).double(),
            weights,
            None,
            tables,
            6,
            0,
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.groupconv.chain(*arguments)
    grad = torch.zeros(1, 6, 3, 3).double()
    with pytest.raises(RuntimeError, match="entries is 5"):
        torch.ops.groupconv.chain_grad(grad, x, weights, tables, 5, True, True)
    with pytest.raises(RuntimeError, match="the operands have 12 and 5"):
        torch.ops.groupconv.chain_grad(grad[:, :5], x, weights, tables, 60, True, True)
    with pytest.raises(RuntimeError, match="grad has sizes"):
        torch.ops.groupconv.chain_grad(grad[..., :2], x, weights, tables, 60, True, True)


def test_no_images_and_images_without_pixels() -> None:
    partitions = CHAINS["in place"]
    x, weights, bias = operands(partitions, (0, 3, 3))
    leaves = [t.requires_grad_() for t in (x, *weights)]
    y = gc.chain(leaves[0], leaves[1:], bias, partitions=partitions)
    assert y.shape == x.shape
    for grad, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    with pytest.raises(ValueError, match="padded input has only 3×0"):  # as conv2d
        gc.chain(torch.zeros(2, 12, 3, 0).double(), weights, bias, partitions=partitions)


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(3, 62, 64), (3, 61, 65)], ids=["whole lines", "parts of lines"])
def test_outputs_beyond_the_caches(size: tuple[int, int, int], isa: str) -> None:
    partitions = [Partition.contiguous(64, 64, 2), Partition.interleaved(64, 64, 2)]
    x, weights, bias = operands(partitions, size, torch.float32)
    weights = [weight / 6 for weight in weights]
    with forced_isa(isa):
        y = gc.chain(x, weights, bias, partitions=partitions, activation="relu")
    doubles = [t.double() for t in (x, bias, *weights)]
    expected = reference.chain(doubles[0], doubles[2:], doubles[1], partitions, "relu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
