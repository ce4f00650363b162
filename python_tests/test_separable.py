"""gc.separable_conv2d: a convolution and a pointwise one in one pass, equal to the two of them."""

import pytest
import torch
from helpers import ISAS, LAYOUTS, PARTITIONS, forced_isa

import groupconv_ext as gc
from groupconv_ext import Partition, reference
from groupconv_ext._layout import is_channels_last
from groupconv_ext.backends import BackendError

pytestmark = pytest.mark.native

WIDE = Partition.contiguous(72, 72, 72)  # channels enough that a part is a band of few rows

PAIRS: dict[str, tuple[Partition, Partition]] = {
    "depthwise, dense": (Partition.contiguous(12, 12, 12), Partition.contiguous(12, 20, 1)),
    "depthwise, permuted": (Partition.interleaved(12, 12, 12), PARTITIONS["permuted"]),
    "two outputs a channel": (Partition.contiguous(6, 12, 6), Partition.random(12, 9, 3, seed=3)),
    "IGCV1": (Partition.contiguous(12, 12, 3), Partition.interleaved(12, 12, 4)),
    "ragged, empty": (
        Partition.random(12, 17, 3, seed=1, uneven=True),
        Partition(17, 9, [[0, 1, 2], [2, 3, 16, 7], []], [[0, 1, 2, 3], [4, 5], [6, 7, 8]]),
    ),
    "no connection": (Partition.contiguous(5, 2, 1), PARTITIONS["no connection"]),
    "wide": (WIDE, Partition.shuffled(72, 24, 3)),
}
WINDOWS = [  # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((5, 2), (1, 2), (4, 0), (1, 3)),
]
SIZES = [(3, 7, 8), (2, 45, 40), (17, 5, 5)]


def operands(
    pair: tuple[Partition, Partition],
    size: tuple[int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """x, weight, pointwise weight and both biases."""
    first, second = pair
    shapes = [(size[0], first.in_channels, *size[1:]), (first.entries, *kernel)]
    shapes += [(second.entries, 1, 1), (first.out_channels,), (second.out_channels,)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_two(name: str, window: tuple[tuple[int, int], ...], isa: str) -> None:
    pair, (kernel, stride, padding, dilation) = PAIRS[name], window
    for size in SIZES:
        x, weight, pointwise, bias, pointwise_bias = operands(pair, size, kernel)
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        sides = (padding[0], padding[0], padding[1], padding[1])
        between = reference.conv2d(
            x, weight, bias, pair[0], stride, sides, dilation, activation="relu6"
        )
        residual = torch.randn(size[0], pair[1].out_channels, *between.shape[2:])
        expected = reference.conv2d(
            between, pointwise, pointwise_bias, pair[1], residual=residual, activation="relu"
        )
        for layout in ("NCHW", "channels_last"):
            with forced_isa(isa):
                y = gc.separable_conv2d(
                    LAYOUTS[layout](x),
                    weight,
                    pointwise,
                    bias,
                    pointwise_bias,
                    partition=pair[0],
                    pointwise_partition=pair[1],
                    activation="relu6",
                    pointwise_activation="relu",
                    residual=residual,
                    backend="native",
                    **settings,
                )
            assert is_channels_last(y) == (layout == "channels_last")
            torch.testing.assert_close(y.contiguous(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_bands_of_one_large_image(stride: int) -> None:
    """channels_last from half a MiB on, NCHW from four: more than one band, the last one lower."""
    pair = (WIDE, PAIRS["wide"][1])
    x, weight, pointwise, bias, _ = operands(pair, (1, 133 * stride, 127 * stride), (3, 3))
    window = {"stride": (stride, stride), "padding": (1, 1, 1, 1)}
    between = reference.conv2d(x, weight, bias, pair[0], **window)
    expected = reference.conv2d(between, pointwise, None, pair[1])
    for layout in ("NCHW", "channels_last"):
        y = gc.separable_conv2d(
            LAYOUTS[layout](x),
            weight,
            pointwise,
            bias,
            partition=pair[0],
            pointwise_partition=pair[1],
            stride=stride,
            padding=1,
        )
        torch.testing.assert_close(y.contiguous(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if "expanded" not in n])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    pair = PAIRS["depthwise, dense"]
    x, weight, pointwise, *_ = operands(pair, (3, 7, 9), (3, 3), dtype)
    x = LAYOUTS[layout](x)
    settings = {"stride": 2, "padding": 1}
    y = gc.separable_conv2d(
        x, weight, pointwise, partition=pair[0], pointwise_partition=pair[1], **settings
    )
    two = gc.conv2d(
        gc.conv2d(x, weight, partition=pair[0], **settings), pointwise, partition=pair[1]
    )
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, two, **tolerance)
    assert is_channels_last(y) == is_channels_last(x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_do_not_depend_on_the_threads(channels_last: bool) -> None:
    pair = PAIRS["wide"]
    for size in ((1, 60, 61), (12, 30, 31)):
        x, weight, pointwise, *_ = operands(pair, size, (3, 3))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        results = []
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results.append(
                    gc.separable_conv2d(
                        x,
                        weight,
                        pointwise,
                        partition=pair[0],
                        pointwise_partition=pair[1],
                        padding=1,
                    )
                )
            finally:
                torch.set_num_threads(before)
        assert torch.equal(*results)


def test_trains_as_two_convolutions() -> None:
    pair = PAIRS["IGCV1"]
    leaves = [t.requires_grad_() for t in operands(pair, (2, 5, 6), (3, 3), torch.float64)]

    def both(*leaves: torch.Tensor) -> torch.Tensor:
        x, weight, pointwise, bias, pointwise_bias = leaves
        return gc.separable_conv2d(
            x,
            weight,
            pointwise,
            bias,
            pointwise_bias,
            partition=pair[0],
            pointwise_partition=pair[1],
            padding=1,
            activation="silu",
        )

    assert torch.autograd.gradcheck(both, leaves)


def test_operation_and_compile() -> None:
    pair = PAIRS["IGCV1"]
    x, weight, pointwise, bias, pointwise_bias = operands(pair, (2, 5, 6), (3, 3))
    tables = [partition.table(x.device) for partition in pair]
    sizes = (12, 12, *(2, 1), *(1, 1, 0, 0), *(1, 1))
    torch.library.opcheck(
        torch.ops.groupconv.separable_conv2d,
        (x, weight, bias, tables[0], 1, pointwise, pointwise_bias, tables[1], 0, None, *sizes),
    )

    def run(x: torch.Tensor) -> torch.Tensor:
        return gc.separable_conv2d(
            x, weight, pointwise, partition=pair[0], pointwise_partition=pair[1], padding=1
        )

    expected = run(x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(run(x[0]), expected[0])
    batched = torch.func.vmap(run)(torch.stack([x, x]))
    torch.testing.assert_close(batched[1], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == torch.bfloat16


def test_empty_batch_and_backends() -> None:
    pair = PAIRS["depthwise, dense"]
    x, weight, pointwise, *_ = operands(pair, (2, 5, 6), (3, 3))

    def run(x: torch.Tensor, backend: str) -> torch.Tensor:
        return gc.separable_conv2d(
            x, weight, pointwise, partition=pair[0], pointwise_partition=pair[1], backend=backend
        )

    assert run(x[:0], "native").shape == (0, 20, 3, 4)
    for backend in ("aten", "dense", "reference"):
        torch.testing.assert_close(run(x, backend), run(x, "native"), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="cannot run here"):
        run(x.half(), "native")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": None}, TypeError, "x is None"),
        ({"weight": [1]}, TypeError, r"^weight is \[1\]; expected a tensor$"),
        ({"bias": 0}, TypeError, "^bias is 0; expected a tensor or None$"),
        ({"residual": 3}, TypeError, "^residual is 3; expected a tensor or None$"),
        ({"x": torch.zeros(12, 5, 6), "residual": 3}, TypeError, "^residual is 3"),
        ({"activation": ["relu"]}, ValueError, r"activation is \['relu'\]"),
        ({"pointwise_activation": ["relu"]}, ValueError, r"activation is \['relu'\]"),
        ({"pointwise_weight": torch.zeros(240, 3, 3)}, ValueError, "expected a 1×1 window"),
        ({"pointwise_weight": torch.zeros(7, 1, 1)}, ValueError, r"expected \[240, 1, 1\]|240"),
        ({"partition": 3}, TypeError, "partition is 3"),
        ({"pointwise_partition": WIDE}, ValueError, "reads 72 channels and partition writes 12"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \[3\]; expected \[12\]"),
        ({"pointwise_bias": torch.zeros(3)}, ValueError, r"bias has shape \[3\]; expected \[20\]"),
        ({"weight": torch.zeros(12, 9, 9)}, ValueError, "the kernel spans 9×9"),
        ({"x": torch.zeros(2, 11, 5, 6)}, ValueError, "x has 11 channels; expected 12"),
        ({"residual": torch.zeros(2, 20, 1, 1)}, ValueError, "residual has shape"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"pointwise_activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"weight": torch.zeros(12, 3, 3).double()}, TypeError, "weight is torch.float64"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], text: str) -> None:
    first, second = PAIRS["depthwise, dense"]
    x, weight, pointwise, *_ = operands((first, second), (2, 5, 6), (3, 3))
    arguments: dict[str, object] = {"x": x, "weight": weight, "pointwise_weight": pointwise}
    arguments |= {"partition": first, "pointwise_partition": second}
    with pytest.raises(error, match=text):
        gc.separable_conv2d(**(arguments | change))  # type: ignore[arg-type]
