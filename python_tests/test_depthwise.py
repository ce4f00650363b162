"""Depthwise convolutions against the reference: every ISA, layout, window and permutation."""

import os
import random
import time

import pytest
import torch
from helpers import (
    DTYPES,
    ISAS,
    LAYOUTS,
    Geometry,
    check_convolution,
    forced_isa,
    needs_native,
    tensors,
)

from groupconv_ext import Partition, reference
from groupconv_ext.autograd import ACTIVATIONS

pytestmark = [needs_native, pytest.mark.native]

LAYOUT_PAIR = ("NCHW", "channels_last")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_layout = pytest.mark.parametrize("layout", LAYOUT_PAIR)


def ragged_multiplier(channels: int, outputs: int, rng: random.Random) -> Partition:
    """One input in every group and any number of outputs, none included."""
    writers = [rng.randrange(channels) for _ in range(outputs)]
    return Partition(
        channels,
        outputs,
        [[channel] for channel in rng.sample(range(channels), channels)],
        [[n for n, writer in enumerate(writers) if writer == g] for g in range(channels)],
    )


def unread_channels(channels: int, rng: random.Random) -> Partition:
    """Fewer outputs than inputs: some channels are in no group."""
    groups = max(1, channels // 2)
    read = rng.sample(range(channels), groups)
    return Partition(channels, groups, [[c] for c in read], [[g] for g in range(groups)])


PARTITIONS = {
    "straight": Partition.contiguous(37, 37, 37),
    "permuted": Partition.random(37, 37, 37, seed=0),
    "multiplied": Partition.contiguous(19, 57, 19),
    "multiplied, permuted": Partition.random(33, 66, 33, seed=0),
    "ragged": ragged_multiplier(20, 45, random.Random(0)),
    "unread": unread_channels(35, random.Random(0)),
    "two outputs of one channel": Partition.contiguous(1, 2, 1),
}


def around(kernel: int, stride: int = 1, size: tuple[int, int] = (9, 18)) -> Geometry:
    pad = kernel // 2
    return Geometry(size, (kernel, kernel), (stride, stride), (pad, pad, pad, pad))


GEOMETRIES = {
    **{f"{k}×{k} stride {s}": around(k, s) for k in (3, 5, 7) for s in (1, 2)},
    "3×3 stride 3": around(3, 3),
    "1 pixel": around(3, size=(1, 1)),
    "kernel = map": Geometry((7, 7), (7, 7)),
    "dilated": Geometry((11, 12), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "dilated, strided": Geometry((11, 12), (3, 3), (2, 2), (3, 3, 3, 3), (3, 3)),
    "one row": Geometry((1, 67), (1, 9), padding=(0, 0, 4, 4)),
    "wider than a tile shares": Geometry((5, 20), (2, 8), padding=(0, 1, 4, 3)),
    "taller than a tile shares": Geometry((20, 5), (8, 2), padding=(4, 3, 0, 1)),
    "padding beyond the kernel": Geometry((4, 3), (3, 3), padding=(3, 4, 4, 3)),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@each_layout
@each_isa
def test_every_window_and_partition(
    isa: str, layout: str, geometry: Geometry, partition: Partition
) -> None:
    with forced_isa(isa):
        for dtype in DTYPES:
            x, weight, bias = tensors(partition, geometry, dtype=dtype)
            place = LAYOUTS[layout]
            check_convolution(partition, geometry, place(x), weight, bias, grad_layout=place)


@each_isa
def test_small_maps_of_more_images_than_are_copied_at_once(isa: str) -> None:
    partitions = [Partition.contiguous(64, 64, 64), Partition.random(64, 128, 64, seed=5)]
    with forced_isa(isa):
        for partition in partitions:
            for geometry in (around(3, size=(7, 7)), around(5, 2, (14, 13))):
                for dtype in (torch.float32, torch.bfloat16):
                    x, weight, bias = tensors(partition, geometry, 13, dtype)
                    for activation in ACTIVATIONS:
                        check_convolution(partition, geometry, x, weight, bias, None, activation)


@each_layout
@each_isa
def test_every_width_and_number_of_channels(isa: str, layout: str) -> None:
    with forced_isa(isa):
        for size in range(1, 36):
            partition = Partition.random(size, size, size, seed=size)
            for stride in (1, 2):
                geometry = around(3, stride, (size % 9 + 1, size))
                for dtype in (torch.float32, torch.bfloat16):
                    x, weight, bias = tensors(partition, geometry, 1, dtype)
                    check_convolution(partition, geometry, LAYOUTS[layout](x), weight, bias)


@each_layout
@each_isa
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [19, 16, 7])
def test_one_pixel_reaches_its_window_and_no_further(
    isa: str, layout: str, value: float, dtype: torch.dtype, width: int
) -> None:
    partition = Partition.random(18, 18, 18, seed=1)
    geometry = around(3, size=(6, width))
    ops, table, window = torch.ops.groupconv, partition.table("cpu"), (1,) * 8
    with forced_isa(isa):
        for row, col in ((0, 0), (5, width - 1), (2, min(15, width - 1)), (3, width - 3)):
            x, weight, _ = tensors(partition, geometry, 1, dtype)
            grad = torch.randn_like(x)
            x[0, 7, row, col] = value
            x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
            y = ops.conv2d(x, weight, None, None, table, 18, *window, 0)
            # torch's own kernels of bfloat16 multiply the padding.
            wide, wide_weight, wide_grad = x.float(), weight.float(), grad.float()
            expected = reference.conv2d(wide, wide_weight, None, partition, *geometry.window)
            assert torch.equal(y.isfinite(), expected.isfinite())
            weight_grad = ops.conv2d_weight_grad(grad, x, table, 18, 3, 3, *window)
            # For a tap that would reach beyond the image, a corner is in no product.
            expected = reference.conv2d_weight_grad(
                wide_grad, wide, partition, (3, 3), *geometry.window
            )
            assert torch.equal(weight_grad.isfinite(), expected.isfinite())
            # Nor is one of the gradient, though torch multiplies the padding with it.
            weight_grad = ops.conv2d_weight_grad(x, grad, table, 18, 3, 3, *window)
            rows = [0 <= row + tap - 1 < 6 for tap in range(3)]
            cols = [0 <= col + tap - 1 < width for tap in range(3)]
            met = torch.tensor([[[down and right for right in cols] for down in rows]])
            writer = [outputs[0] == 7 for outputs in partition.outputs]
            met = met & torch.tensor(writer)[:, None, None]
            assert torch.equal(weight_grad.isfinite(), ~met)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_steps_of_two_beside_any_padding(isa: str, padding: int, dtype: torch.dtype) -> None:
    partition = Partition.random(7, 7, 7, seed=2)
    with forced_isa(isa):
        for width in (5, 14, 15, 16, 17, 31, 33, 34, 35, 66):
            geometry = Geometry((6, width), (3, 3), (2, 2), (padding,) * 4)
            x, weight, bias = tensors(partition, geometry, 2, dtype)
            residual = torch.randn_like(
                reference.conv2d(x, weight, bias, partition, *geometry.window)
            )
            check_convolution(partition, geometry, x, weight, bias, residual, "relu")
            # A pixel reaches its windows and no further.
            for col in {0, 1, width // 2, width - 2, width - 1}:
                marked = x.clone()
                marked[0, 3, 2, col] = torch.nan
                places = (2, 2, *(padding,) * 4, 1, 1)
                table = partition.table("cpu")
                y = torch.ops.groupconv.conv2d(marked, weight, bias, None, table, 7, *places, 0)
                wide = marked.float(), weight.float(), bias.float()
                expected = reference.conv2d(*wide, partition, *geometry.window)
                assert torch.equal(y.isnan(), expected.isnan())


@each_layout
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, layout: str, dtype: torch.dtype
) -> None:
    partition = Partition.random(160, 160, 160, seed=0)
    geometry = around(3, size=(30, 31))
    x, weight, _ = tensors(partition, geometry, 3, dtype)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn_like(x))
    table, window = partition.table("cpu"), (1,) * 8
    last = layout == "channels_last"
    ops = torch.ops.groupconv

    def run() -> list[torch.Tensor]:
        return [
            ops.conv2d(x, weight, None, None, table, 160, *window, 0),
            ops.conv2d_input_grad(grad, weight, table, 160, 30, 31, *window, last),
            ops.conv2d_weight_grad(grad, x, table, 160, 3, 3, *window),
        ]

    threads = torch.get_num_threads()
    try:
        with forced_isa(isa):
            torch.set_num_threads(1)
            alone = run()
            torch.set_num_threads(3)
            assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def random_case(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, times = rng.choice((1, 2, 3, 5, 16, 17, 33, 40)), rng.choice((1, 1, 1, 2, 3))
    partition = rng.choice(
        (
            Partition.contiguous(channels, channels * times, channels),
            Partition.random(channels, channels * times, channels, seed=seed),
            ragged_multiplier(channels, channels * times, rng),
            unread_channels(channels, rng),
        )
    )
    kernel = rng.choice((1, 2, 3, 3, 4, 5, 6, 7, 9)), rng.choice((1, 2, 3, 3, 4, 5, 6, 7, 9))
    stride = rng.choice((1, 1, 2, 3))
    strides = (stride, stride if rng.random() < 0.7 else rng.choice((1, 2, 3)))
    dilation = rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 1, 1, 2, 3))
    top, bottom, left, right = (rng.choice((0, 1, 2, 3, kernel[i // 2] // 2)) for i in range(4))
    height, width = (
        max(1, dilation[i] * (kernel[i] - 1) + 1 - pad)
        + rng.choice((0, 1, 2, 7, rng.randrange(40)))
        for i, pad in enumerate((top + bottom, left + right))
    )
    geometry = Geometry((height, width), kernel, strides, (top, bottom, left, right), dilation)
    x, weight, bias = tensors(partition, geometry, rng.randint(1, 3), rng.choice(DTYPES))
    size = reference.output_size(geometry.input_size, geometry.kernel_size, *geometry.window)
    residual = x.new_empty(len(x), partition.out_channels, *size).normal_()
    names = list(LAYOUTS) if rng.random() < 0.4 else LAYOUT_PAIR
    layout, grad_layout, residual_layout = (LAYOUTS[rng.choice(names)] for _ in range(3))
    with forced_isa(rng.choice(ISAS)):
        check_convolution(
            partition,
            geometry,
            layout(x),
            weight,
            rng.choice((None, bias)),
            rng.choice((None, residual_layout(residual))),
            rng.choice(ACTIVATIONS),
            layout if rng.random() < 0.6 else grad_layout,
        )


def test_hundreds_of_random_cases() -> None:
    first = int(os.environ.get("GROUPCONV_SEED", time.time_ns() % 2**31))
    end = time.monotonic() + 8
    for seed in range(first, first + 5000):
        try:
            random_case(seed)
        except BaseException:
            print(f"replay with GROUPCONV_SEED={seed}")
            raise
        if time.monotonic() > end:
            break
