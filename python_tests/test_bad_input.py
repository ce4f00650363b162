"""What is wrong is refused: with the value and what was expected, before anything is computed.

First the public functions. Then the raw operations, which check everything once more, because a
hostile table must never become an access out of bounds whoever passes it: that half is what the
sanitizers run.
"""

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ISAS, PARTITIONS, forced_isa, needs_native

import groupconv_ext as gc
from groupconv_ext import Partition, _ops

RAGGED = PARTITIONS["ragged"]  # 9 → 7 channels, 19 entries
EVEN = PARTITIONS["permuted"]  # 12 → 8 channels, 2 groups of 6 and 4

# ---- the public functions -----------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 9, 5, 6),
        "weight": torch.randn(19, 3, 3),
        "bias": torch.randn(7),
        "partition": RAGGED,
    }


LARGE = 2**31

WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("5-d x", {"x": torch.ones(1, 2, 9, 5, 6)}, ValueError, r"x has shape \[1, 2, 9, 5, 6\]; exp"),
    ("2-d x", {"x": torch.ones(5, 6)}, ValueError, r"x has shape \[5, 6\]; expected"),
    ("channels", {"x": torch.ones(2, 8, 5, 6)}, ValueError, "x has 8 channels; expected 9"),
    ("integers", {"x": torch.ones(2, 9, 5, 6).int(), "backend": "auto"}, TypeError, "int32.* floa"),
    ("complex", {"x": torch.ones(2, 9, 5, 6).cfloat(), "backend": "auto"}, TypeError, "complex64"),
    ("x no tensor", {"x": [[1.0]]}, TypeError, r"x is \[\[1\.0\]\]; expected a tensor"),
    ("weight length", {"weight": torch.ones(18, 3, 3)}, ValueError, r"\[18, 3, 3\]; .*\[19, kh"),
    ("weight 4-d", {"weight": torch.ones(7, 9, 3, 3)}, ValueError, r"\[7, 9, 3, 3\]; .*\[19, kh"),
    ("weight 2-d", {"weight": torch.ones(19, 3)}, ValueError, r"\[19, 3\]; .*\[19, kh"),
    ("weight dtype", {"weight": torch.ones(19, 3, 3).double()}, TypeError, "float64 and x is .*32"),
    (
        "weight device",
        {"weight": torch.ones(19, 3, 3, device="meta")},
        ValueError,
        "meta and x .*cpu",
    ),
    ("weight no tensor", {"weight": None}, TypeError, "weight is None; expected a tensor"),
    ("no kernel", {"weight": torch.ones(19, 0, 3)}, ValueError, "kernel is 0×3; expected at least"),
    ("bias length", {"bias": torch.ones(9)}, ValueError, r"bias has shape \[9\]; expected \[7\]"),
    (
        "bias 2-d",
        {"bias": torch.ones(7, 1)},
        ValueError,
        r"bias has shape \[7, 1\]; expected \[7\]",
    ),
    ("bias dtype", {"bias": torch.ones(7).bfloat16()}, TypeError, "bias is .*bfloat16 and x is"),
    (
        "bias device",
        {"bias": torch.ones(7, device="meta")},
        ValueError,
        "bias is on meta and x .*cpu",
    ),
    ("bias no tensor", {"bias": 0.0}, TypeError, r"bias is 0\.0; expected a tensor or"),
    (
        "residual",
        {"residual": torch.ones(2, 7, 5, 6)},
        ValueError,
        r"\[2, 7, 5, 6\]; .*\[2, 7, 3, 4",
    ),
    (
        "residual dtype",
        {"residual": torch.ones(2, 7, 3, 4).double()},
        TypeError,
        "residual is .*64",
    ),
    ("stride 0", {"stride": 0}, ValueError, "stride is 0; expected 1 ≤ stride"),
    ("stride -1", {"stride": (1, -1)}, ValueError, r"stride is \(1, -1\); expected 1 ≤ stride"),
    ("stride huge", {"stride": LARGE}, ValueError, "stride is 2147483648; expected .* 2³¹ − 1"),
    ("stride float", {"stride": 1.0}, TypeError, r"stride is 1\.0; expected an int"),
    ("stride bool", {"stride": True}, TypeError, "stride is True; expected an int"),
    ("three strides", {"stride": (1, 1, 1)}, ValueError, "3 numbers; expected one or two"),
    (
        "dilation 0",
        {"dilation": (0, 1)},
        ValueError,
        r"dilation is \(0, 1\); expected 1 ≤ dilation",
    ),
    ("dilation huge", {"dilation": LARGE}, ValueError, "dilation is 2147483648; expected"),
    ("padding -1", {"padding": -1}, ValueError, "padding is -1; expected 0 ≤ padding"),
    ("padding huge", {"padding": (0, LARGE)}, ValueError, "padding is .0, 2147483648.; expected"),
    (
        "padding name",
        {"padding": "full"},
        ValueError,
        "padding is 'full'; expected 'same', 'valid'",
    ),
    ("same strided", {"padding": "same", "stride": 2}, ValueError, r"stride 1, got \(2, 2\)"),
    ("kernel", {"weight": torch.ones(19, 6, 3)}, ValueError, "spans 6×3 pixels .* only 5×6"),
    ("dilated kernel", {"dilation": 3}, ValueError, "spans 7×7 pixels .* only 5×6"),
    ("activation", {"activation": "gelu"}, ValueError, "activation is 'gelu'; expected .*'silu'"),
    ("partition", {"partition": 3}, TypeError, "partition is 3; expected a .*Partition"),
    ("backend", {"backend": "cudnn"}, ValueError, "backend is 'cudnn'; expected .*'native'"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_conv2d_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """In the same words whoever would have computed it, and whether or not it did so before."""
    for backend in ("native", "native", "aten", "reference", "auto"):
        given = arguments() | {"backend": backend}
        with pytest.raises(error, match=message):
            gc.conv2d(**(given | change))
        with torch.no_grad(), pytest.raises(error, match=message):
            gc.conv2d(**(given | change))
        gc.conv2d(**given)
        with torch.no_grad():
            gc.conv2d(**given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 2, 9, 5)}, ValueError, r"x has shape \[1, 2, 9, 5\]; expected \[B, C"),
        ({"x": torch.ones(2, 8, 6)}, ValueError, "x has 8 channels; expected 9"),
        ({"weight": torch.ones(19)}, ValueError, r"weight has shape \[19\]; expected \[entries, k"),
        ({"weight": torch.ones(18, 3)}, ValueError, r"\[18, .*3\]; expected \[19,"),
        ({"stride": (1, 1)}, TypeError, r"stride is \(1, 1\); expected an int"),
        ({"stride": (1.5,)}, TypeError, r"stride is .*1\.5.*; expected an int"),
        ({"padding": -1}, ValueError, "padding is .*-1.*; expected 0 ≤ padding"),
        ({"dilation": 0}, ValueError, "dilation is .*0.*; expected 1 ≤ dilation"),
        ({"residual": torch.ones(2, 7, 6)}, ValueError, r"\[2, 7, .*6\]; expected \[2, 7, .*4\]"),
    ],
)
def test_conv1d_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments() | {"x": torch.randn(2, 9, 6), "weight": torch.randn(19, 3)}
    gc.conv1d(**given)
    with pytest.raises(error, match=message):
        gc.conv1d(**(given | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partition(2, 2, [[0], [1]], [[0], [0, 1]]), "channel 0 twice; expected every"),
        (lambda: Partition(2, 2, [[0], [1]], [[0], []]), "never writes channel 1; expected all"),
        (lambda: Partition(2, 2, [[0], [-1]], [[0], [1]]), r"inputs\[1\]\[0\] is -1; expected 0 ≤"),
        (lambda: Partition(2, 2, [[0], [2]], [[0], [1]]), r"inputs\[1\]\[0\] is 2; expected 0 ≤"),
        (lambda: Partition(2, 2, [], []), "groups is 0; expected 1 ≤ groups"),
        (lambda: Partition.contiguous(4, 4, 0), "groups is 0; expected 1 ≤ groups"),
        (lambda: Partition.from_labels([0, float("nan")], [0], 1), "nan; expected a whole number"),
        (lambda: Partition(LARGE, 1, [[0]], [[0]]), "in_channels is 2147483648; expected .* 2³¹"),
        (lambda: Partition(2, 2, [[0]], [[0, 2**64]]), "integer beyond 64 bits"),
    ],
)
def test_no_such_partition(make: Callable[[], Partition], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- the raw operations -------------------------------------------------------------------------


def call(name: str, **change: Any) -> torch.Tensor:
    """One of the operations, by schema names, with everything right except for ``change``."""
    window = dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w"), 1)
    window |= dict.fromkeys(("pad_top", "pad_bottom", "pad_left", "pad_right"), 0)
    given: dict[str, Any] = {"table": RAGGED.cpu_table, **window}
    if name == "conv2d":
        given |= {"input": torch.ones(2, 9, 5, 6), "weight": torch.ones(19, 3, 3)}
        given |= {"bias": torch.ones(7), "residual": None, "out_channels": 7, "activation": 0}
    elif name == "conv2d_input_grad":
        given |= {"grad": torch.ones(2, 7, 3, 4), "weight": torch.ones(19, 3, 3)}
        given |= {"in_channels": 9, "height": 5, "width": 6, "channels_last": False}
    else:
        given |= {"grad": torch.ones(2, 7, 3, 4), "input": torch.ones(2, 9, 5, 6)}
        given |= {"entries": 19, "kernel_h": 3, "kernel_w": 3}
    assert set(change) <= set(given)
    result: torch.Tensor = getattr(torch.ops.groupconv, name)(**(given | change))
    return result


each_operation = pytest.mark.parametrize(
    "name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]
)


def changed(position: int, *values: int) -> torch.Tensor:
    table = RAGGED.cpu_table.clone()
    table[position : position + len(values)] = torch.tensor(values)
    return table


# [in_channels, out_channels, groups, reads], then where everything else begins:
IN_OFFSETS, OUT_OFFSETS, INPUTS, OUTPUTS = 4, 8, 12, 21
MOST = LARGE - 1
INT_TABLE = RAGGED.cpu_table

HOSTILE: list[tuple[str, torch.Tensor, str]] = [
    ("empty", INT_TABLE[:0], "length 0 is shorter than its header of 4"),
    ("header cut", INT_TABLE[:3], "length 3 is shorter"),
    ("end cut", INT_TABLE[:-1], "length 27 does not fit its header, expected 28"),
    ("too long", torch.cat([INT_TABLE, INT_TABLE[:1]]), "length 29 does not fit"),
    ("no groups", changed(2, 0), r"\(9, 7, 0, 9\) needs counts"),
    ("negative groups", changed(2, -3), r"\(9, 7, -3, 9\) needs counts"),
    ("negative channels", changed(0, -9), r"\(-9, 7, 3, 9\) needs counts"),
    ("negative reads", changed(3, -1), r"\(9, 7, 3, -1\) needs counts"),
    ("other groups", changed(2, 4), "length 28 does not fit its header, expected 30"),
    ("huge groups", changed(2, MOST), "length 28 does not fit its header, expected 4294967316"),
    ("all huge", changed(0, *[MOST] * 4), "length 28 does not fit its header, expected 8589934594"),
    ("first offset", changed(IN_OFFSETS, 1), "input offset 1 is the first offset, expected 0"),
    ("falling offsets", changed(IN_OFFSETS, 0, 6, 4), "4 is an offset below the one before it, 6"),
    ("negative offset", changed(OUT_OFFSETS, 0, -2), "output offset -2 is an offset below"),
    (
        "offset beyond",
        changed(IN_OFFSETS, 0, 3, MOST),
        "9 is an offset below the one before it, 2147",
    ),
    ("last offset", changed(IN_OFFSETS + 3, 8), "input offset 8 is the last offset, expected 9"),
    (
        "last output offset",
        changed(OUT_OFFSETS + 3, MOST),
        "2147483647 is the last offset, exp.* 7",
    ),
    ("negative input", changed(INPUTS, -1), "input channel -1 is out of range, expected 0..8"),
    ("input too large", changed(INPUTS + 8, 9), "input channel 9 is out of range, expected 0..8"),
    ("input huge", changed(INPUTS, MOST), "input channel 2147483647 is out of range"),
    ("input lowest", changed(INPUTS, -LARGE), "input channel -2147483648 is out of range"),
    ("input twice", changed(INPUTS, 1), "input channel 1 is read twice by one group"),
    ("negative output", changed(OUTPUTS, -7), "output channel -7 is out of range, expected 0..6"),
    (
        "output too large",
        changed(OUTPUTS + 6, 7),
        "output channel 7 is out of range, expected 0..6",
    ),
    ("output twice", changed(OUTPUTS, 0), "output channel 0 is written by two groups"),
    ("fewer inputs", changed(0, 8), "has 8 input and 7 output channels, the operands have 9 and 7"),
    ("huge inputs", changed(0, 2**30), "has 1073741824 input and 7 output channels, the operands"),
    ("fewer outputs", changed(1, 6), "length 28 does not fit its header, expected 27"),
    ("int64", INT_TABLE.long(), "must be a contiguous 1-d int32 tensor"),
    ("float", INT_TABLE.float(), "must be a contiguous 1-d int32 tensor"),
    ("2-d", INT_TABLE[None], r"must be a contiguous 1-d int32 tensor .* \[1, 28\]"),
    ("0-d", INT_TABLE[0], "must be a contiguous 1-d int32 tensor"),
    ("strided", INT_TABLE.repeat_interleave(2)[::2], "must be a contiguous 1-d int32 tensor"),
    ("another partition's", EVEN.cpu_table, "has 12 input and 8 output .* operands have 9 and 7"),
]


@needs_native
@pytest.mark.native
@each_operation
@pytest.mark.parametrize(
    ("table", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_hostile_tables_are_refused(name: str, table: torch.Tensor, message: str) -> None:
    call(name)
    with pytest.raises(RuntimeError, match=message):
        call(name, table=table)


@needs_native
@pytest.mark.native
def test_any_damaged_table_is_refused_or_harmless() -> None:
    """One or two entries overwritten at random; what still is a partition must be computed."""
    random = torch.Generator().manual_seed(0)
    computed = 0
    for _ in range(3000):
        table = INT_TABLE.clone()
        for _ in range(2):
            position = int(torch.randint(len(table), (), generator=random))
            table[position] = int(torch.randint(-2, 12, (), generator=random))
        try:
            partition = Partition.from_table(table)
        except (ValueError, TypeError):
            partition = None
        for name in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
            try:
                result = call(name, table=table)
            except RuntimeError:
                continue
            assert partition is not None, f"{name} accepted {table.tolist()}"
            assert result.isfinite().all()
            computed += 1
    assert computed > 0


@needs_native
@pytest.mark.native
@each_operation
def test_a_table_says_what_it_says_now(name: str) -> None:
    """A table that is written to between two calls is another one, wherever it lies."""
    table = INT_TABLE.clone()
    before = call(name, table=table)
    first, second = int(table[OUTPUTS]), int(table[OUTPUTS + 1])
    table[OUTPUTS], table[OUTPUTS + 1] = second, first
    swapped = call(name, table=table)
    assert torch.equal(swapped, call(name, table=table.clone()))
    table[OUTPUTS + 1] = second
    with pytest.raises(RuntimeError, match=f"output channel {second} is written by two groups"):
        call(name, table=table)
    table.copy_(INT_TABLE)
    assert torch.equal(call(name, table=table), before)


SETTINGS = ("stride_h", "stride_w", "dilation_h", "dilation_w")
PADDINGS = ("pad_top", "pad_bottom", "pad_left", "pad_right")


@needs_native
@pytest.mark.native
@each_operation
@pytest.mark.parametrize("setting", [*SETTINGS, *PADDINGS])
def test_impossible_windows_are_refused(name: str, setting: str) -> None:
    least = 0 if setting in PADDINGS else 1
    for value in (least - 1, -LARGE, LARGE, 2**62, -(2**63)):
        message = f"{setting} must be from {least} to 2147483647, got {value}"
        with pytest.raises(RuntimeError, match=message):
            call(name, **{setting: value})
    with pytest.raises(RuntimeError, match=r"pixels, more than the padded|sizes .* expected|large"):
        call(name, dilation_h=MOST, dilation_w=MOST)
    with pytest.raises(RuntimeError, match=r"is too large|has sizes .* expected"):
        call(name, **dict.fromkeys(PADDINGS, MOST))


@needs_native
@pytest.mark.native
def test_the_largest_window_that_fits() -> None:
    far = {"stride_h": MOST, "stride_w": MOST}
    assert torch.equal(call("conv2d", **far), call("conv2d")[:, :, :1, :1])
    one = torch.ones(2, 7, 1, 1)
    assert call("conv2d_input_grad", grad=one, **far).isfinite().all()
    assert call("conv2d_weight_grad", grad=one, **far).isfinite().all()
    tall = {"pad_top": MOST, "stride_h": MOST}
    assert call("conv2d", **tall).shape == (2, 7, 2, 4)


X, W, G = torch.ones(2, 9, 5, 6), torch.ones(19, 3, 3), torch.ones(2, 7, 3, 4)
META = torch.device("meta")


def shrunk(tensor: torch.Tensor, by: int = 1) -> torch.Tensor:
    """With memory for ``by`` elements less than its sizes tell."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_((tensor.numel() - by) * tensor.element_size())
    return tensor


def freed(tensor: torch.Tensor) -> torch.Tensor:
    return shrunk(tensor, tensor.numel())


@needs_native
@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "conv2d",
            {"out_channels": 8},
            "has 9 input and 7 output channels, the operands have 9 and 8",
        ),
        ("conv2d", {"out_channels": -1}, "has 9 input and 7 output .* have 9 and -1"),
        ("conv2d", {"activation": 5}, "activation must be 0 .* got 5"),
        ("conv2d", {"activation": -1, "input": X[:0]}, "activation must be 0 .* got -1"),
        ("conv2d", {"input": X[0]}, r"input must have 4 dimensions, got sizes \[9, 5, 6\]"),
        ("conv2d", {"input": X[:, :8]}, "the operands have 8 and 7"),
        ("conv2d", {"input": X[:, :, :2]}, "reaches over 3×3 pixels, .* 2×6"),
        (
            "conv2d",
            {"input": X.half(), "weight": W.half(), "bias": None},
            "float32, float64 and bf",
        ),
        ("conv2d", {"input": X.int(), "weight": W.int(), "bias": None}, "float32, float64 and bf"),
        ("conv2d", {"input": X.to(META)}, "on .*'cpu', 'meta'.*; expected one device"),
        ("conv2d", {"input": X.to_sparse()}, "Sparse"),
        ("conv2d", {"input": freed(X)}, r"input of sizes \[2, 9, 5, 6\] reaches .* to 0 bytes"),
        ("conv2d", {"input": shrunk(X)}, "input of sizes .* freed or shrunk to 2156 bytes"),
        ("conv2d", {"weight": shrunk(W)}, "weight of sizes .* shrunk to 680 bytes"),
        ("conv2d", {"bias": shrunk(torch.ones(7))}, "bias of sizes .* shrunk to 24 bytes"),
        ("conv2d", {"residual": shrunk(G)}, "residual of sizes .* shrunk to 668 bytes"),
        ("conv2d", {"table": shrunk(INT_TABLE)}, "table of sizes .* shrunk to 108 bytes"),
        ("conv2d", {"input": X[:0].half(), "weight": W.half(), "bias": None}, "CPU kernels take"),
        ("conv2d", {"input": X[:, :, :1].expand(2, 9, 2**40 + 1, 6)}, "higher or wider than 1099"),
        ("conv2d", {"input": X[:0, :, :1, :1].expand(0, 9, 2**40, 2**40)}, "is too large"),
        ("conv2d", {"weight": W[:18]}, r"must have sizes \[19, kh, kw\], got \[18, 3, 3\]"),
        ("conv2d", {"weight": W[:, 0]}, r"must have sizes \[19, kh, kw\], got \[19, 3\]"),
        ("conv2d", {"weight": W[:, :0]}, "kernel height must be from 1 to .* got 0"),
        ("conv2d", {"weight": W.double()}, "weight has another dtype than input"),
        ("conv2d", {"weight": W.to(META)}, "on .*'cpu', 'meta'.*; expected one device"),
        ("conv2d", {"weight": freed(W)}, r"weight of sizes \[19, 3, 3\] reaches beyond"),
        ("conv2d", {"weight": W[:, :1].expand(19, MOST, 3)}, "pixels, more than the padded"),
        ("conv2d", {"bias": torch.ones(8)}, r"bias must have sizes \[7\], got \[8\]"),
        ("conv2d", {"bias": torch.ones(7, 1)}, r"bias must have sizes \[7\], got \[7, 1\]"),
        ("conv2d", {"bias": torch.ones(7).double()}, "bias has another dtype than input"),
        (
            "conv2d",
            {"residual": G[:1]},
            r"residual has sizes \[1, 7, 3, 4\], expected \[2, 7, 3, 4",
        ),
        ("conv2d", {"residual": G[0]}, "residual must have 4 dimensions"),
        ("conv2d", {"residual": G.double()}, "residual has another dtype than input"),
        ("conv2d_input_grad", {"in_channels": 8}, "the operands have 8 and 7"),
        ("conv2d_input_grad", {"grad": G[:, :6]}, "the operands have 9 and 6"),
        ("conv2d_input_grad", {"grad": shrunk(G)}, "grad of sizes .* shrunk to 668 bytes"),
        ("conv2d_input_grad", {"weight": shrunk(W)}, "weight of sizes .* shrunk to 680 bytes"),
        ("conv2d_input_grad", {"height": 2**40 + 1}, "height must be from 0 to 1099511627776, got"),
        ("conv2d_input_grad", {"height": -1}, "height must be from 0 to .* got -1"),
        (
            "conv2d_input_grad",
            {"width": 2**62},
            "width must be from 0 to .* got 4611686018427387904",
        ),
        ("conv2d_input_grad", {"height": 2}, "reaches over 3×3 pixels, .* 2×6"),
        (
            "conv2d_input_grad",
            {"height": 7},
            r"grad has sizes \[2, 7, 3, 4\], expected \[2, 7, 5, 4",
        ),
        ("conv2d_input_grad", {"height": MOST, "width": MOST}, "too large|expected .*21474836"),
        ("conv2d_input_grad", {"weight": W.to(META)}, "on .*'cpu', 'meta'.*; expected one device"),
        ("conv2d_weight_grad", {"entries": 20}, "entries is 20, the partition table says 19"),
        ("conv2d_weight_grad", {"entries": -1}, "entries is -1, the partition table says 19"),
        ("conv2d_weight_grad", {"kernel_h": 0}, "kernel height must be from 1 to .* got 0"),
        (
            "conv2d_weight_grad",
            {"kernel_w": LARGE},
            "kernel width must be from 1 to .* got 2147483648",
        ),
        ("conv2d_weight_grad", {"kernel_h": 7}, "reaches over 7×3 pixels, .* 5×6"),
        ("conv2d_weight_grad", {"kernel_h": 2}, r"grad has sizes .*, expected \[2, 7, 4, 4\]"),
        (
            "conv2d_weight_grad",
            {"grad": G[:1]},
            r"grad has sizes \[1, 7, .*, expected \[2, 7, 3, 4\]",
        ),
        ("conv2d_weight_grad", {"grad": G.double()}, "grad has another dtype than input"),
        (
            "conv2d_weight_grad",
            {"input": X[:, :8]},
            "the operands have 8 and 7",
        ),
        ("conv2d_weight_grad", {"grad": shrunk(G)}, "grad of sizes .* shrunk to 668 bytes"),
        ("conv2d_weight_grad", {"input": shrunk(X)}, "input of sizes .* shrunk to 2156 bytes"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(name, **change)


@needs_native
@pytest.mark.native
def test_a_view_may_use_all_of_its_memory() -> None:
    larger = torch.ones(2 * 9 * 5 * 6 + 3)
    assert torch.equal(call("conv2d", input=larger[3:].view(2, 9, 5, 6)), call("conv2d"))
    assert torch.equal(call("conv2d", input=X[:1, :1, :1, :1].expand_as(X)), call("conv2d"))


@needs_native
@pytest.mark.native
def test_a_header_is_believed_only_where_the_operands_agree() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RuntimeError, match="has 1073741824 input"):
        call("conv2d", table=changed(0, 2**30))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 << 10, f"{grown} KiB for a table that was refused"


@needs_native
@pytest.mark.native
def test_heights_beyond_32_bits() -> None:
    """What the forward pass takes, its gradients take: here with nothing in the batch."""
    tall = 2**33
    x, grad = (torch.ones(0, c, 1, 6).expand(0, c, tall, 6) for c in (9, 7))
    window = {"pad_top": 1, "pad_bottom": 1, "pad_left": 1, "pad_right": 1}
    assert call("conv2d", input=x, **window).shape == grad.shape
    assert call("conv2d_input_grad", grad=grad, height=tall, **window).shape == x.shape
    assert call("conv2d_weight_grad", grad=grad, input=x, **window).shape == W.shape


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
def test_a_huge_window_without_weights_costs_nothing(isa: str) -> None:
    partition = Partition(9, 7, [[]], [range(7)])
    huge = {"pad_top": MOST - 3, "pad_left": MOST - 3}
    bias, residual = torch.arange(-3.0, 4.0), torch.randn(2, 7, 3, 4)
    weight = torch.ones(0, MOST, MOST)
    with forced_isa(isa):
        y = call(
            "conv2d",
            table=partition.cpu_table,
            weight=weight,
            bias=bias,
            residual=residual,
            activation=1,
            **huge,
        )
        assert torch.equal(y, (bias[:, None, None] + residual).relu())
        grads = {"table": partition.cpu_table, "grad": G, **huge}
        assert not call("conv2d_input_grad", weight=weight, **grads).any()
        kernel = {"kernel_h": MOST, "kernel_w": MOST}
        assert call("conv2d_weight_grad", entries=0, **kernel, **grads).shape == weight.shape


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS)
def test_operands_are_left_as_they_were(isa: str) -> None:
    operands = {
        "input": X.clone(),
        "weight": W.clone(),
        "bias": torch.ones(7),
        "residual": G.clone(),
    }
    before = {key: value.clone() for key, value in operands.items()}
    with forced_isa(isa):
        call("conv2d", **operands, activation=3)
    for key, value in operands.items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(RAGGED.cpu_table, Partition(*RAGGED.__reduce__()[1]).cpu_table)


# ---- memory that there is not -------------------------------------------------------------------


@needs_native
def test_out_of_memory_is_torchs_own_error() -> None:
    """Not that of a call that failed, which is all that the stable interface says."""
    partition = Partition.contiguous(2, 2048, 2)
    x = torch.zeros(1, 1, 1, 1).expand(1, 2, 1 << 19, 1 << 19)
    weight = torch.ones(partition.entries, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="you tried to allocate 2251799813685248 bytes"):
        gc.conv2d(x, weight, partition=partition, backend="native")
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        gc.conv2d(x, weight, partition=partition, backend="aten")
    y = gc.conv2d(x[:, :, :3, :3], weight, partition=partition, backend="native")
    assert y.shape == (1, 2048, 3, 3)


def test_memory_that_is_there_by_now() -> None:
    error = RuntimeError("out of memory: 16 bytes could not be allocated\nException raised from")
    found = _ops._out_of_memory(error, torch.device("cpu"))
    assert type(found) is torch.OutOfMemoryError
    assert "16 bytes could not be allocated" in str(found)
