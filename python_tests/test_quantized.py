"""The kernels for uint8 images and int8 weights: the same numbers as the reference, every one.

Sums are exact and everything after them is rounded in one way, so results are compared with
``torch.equal``, on every instruction set, in every layout.
"""

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    GEOMETRIES,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    forced_isa,
    needs_native,
    runnable_isas,
    window_of,
)

from groupconv_ext import Partition, Quantization, _ops, quantized_conv2d, reference
from groupconv_ext.quantization import QuantizedWeight, prepare_weight

pytestmark = [needs_native, pytest.mark.native]

BYTE_ISAS = [isa for isa in runnable_isas() if isa != "avx512_bf16"]
"""``avx512_bf16`` takes the kernels of another for bytes."""

INPUT = Quantization(0.02, 37)
STORED = (None, Quantization(0.11, 0), Quantization(0.7, 141), Quantization(0.3, 255))


@pytest.fixture(params=BYTE_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param):
        yield request.param


def operands(
    partition: Partition, geometry: Geometry, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight, its scale, bias."""
    x = torch.randint(0, 256, (batch, partition.in_channels, *geometry.input_size)).byte()
    weight = torch.randint(-128, 128, (partition.entries, *geometry.kernel_size)).to(torch.int8)
    scale = 0.01 + torch.rand(partition.out_channels) / 50
    return x, weight, scale, torch.randn(partition.out_channels)


def check(
    partition: Partition,
    geometry: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    write_as: Quantization | None,
    activation: str | None = None,
    read_as: Quantization = INPUT,
) -> torch.Tensor:
    prepared = prepare_weight(weight, scale, bias, partition=partition, read_as=read_as)
    steps = torch.zeros(partition.out_channels, dtype=torch.int64)
    step = scale.double() * read_as.scale
    if bias is not None:
        steps = (bias.double() / step).round().long()
    expected = reference.quantized_conv2d(
        x,
        weight,
        steps,
        step.float(),
        partition,
        read_as.zero_point,
        *geometry.window,
        activation,
        write_as,
    )
    found = call(x, prepared, partition, geometry, write_as, activation)
    assert found.dtype == (torch.float32 if write_as is None else torch.uint8)
    assert torch.equal(found, expected)
    return found


def call(
    x: torch.Tensor,
    weight: QuantizedWeight,
    partition: Partition,
    geometry: Geometry,
    write_as: Quantization | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    scale, zero_point = write_as or (1.0, 0)
    return _ops.quantized_conv2d(
        x,
        weight.packed,
        weight.start,
        weight.scale,
        partition.cpu_table,
        partition.out_channels,
        *geometry.kernel_size,
        *window_of(geometry),
        (None, "relu", "relu6").index(activation),
        weight.read_as.zero_point,
        scale,
        zero_point,
        write_as is None,
    )


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_every_partition_and_window(isa: str, partition: Partition, geometry: Geometry) -> None:
    x, *weight = operands(partition, geometry)
    for layout in (LAYOUTS["NCHW"], LAYOUTS["channels_last"]):
        for output in (None, STORED[2]):
            check(partition, geometry, layout(x), *weight, output)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_ways_out(
    isa: str, activation: str | None, stored: Quantization | None, layout: str
) -> None:
    for partition in (PARTITIONS["ragged"], Partition.contiguous(24, 48, 2)):
        geometry = Geometry((5, 9), (3, 3), padding=(1, 1, 1, 1))
        x, *weight = operands(partition, geometry)
        check(partition, geometry, LAYOUTS[layout](x), *weight, stored, activation)


def views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Images that are not dense, or begin anywhere, among bytes that must not be read."""

    def cut(x: torch.Tensor, *steps: int, channels_last: bool = False) -> torch.Tensor:
        sizes = [step * (size + 2) for step, size in zip(steps, x.shape, strict=True)]
        larger = torch.full(sizes, 201, dtype=torch.uint8)
        if channels_last:
            larger = larger.contiguous(memory_format=torch.channels_last)
        view = larger[tuple(slice(s, s * (n + 1), s) for s, n in zip(steps, x.shape, strict=True))]
        return view.copy_(x)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        larger = torch.full((x.numel() + 3,), 201, dtype=torch.uint8)
        return larger[3:].view_as(x).copy_(x)

    return {
        "images cut": lambda x: cut(x, 2, 1, 1, 1),
        "channels cut": lambda x: cut(x, 1, 2, 1, 1),
        "rows cut": lambda x: cut(x, 1, 1, 2, 1),
        "columns cut": lambda x: cut(x, 1, 1, 1, 3),
        "channels_last, channels cut": lambda x: cut(x, 1, 1, 1, 1, channels_last=True),
        "channels_last, all cut": lambda x: cut(x, 2, 2, 2, 2, channels_last=True),
        "rows and columns swapped": lambda x: x.mT.contiguous().mT,
        "images innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "unaligned": shifted,
        "unaligned channels_last": lambda x: shifted(x.movedim(1, -1)).movedim(-1, 1),
        "one image expanded": lambda x: x[:1].expand_as(x),
        "one channel expanded": lambda x: x[:, :1].expand_as(x),
        "one pixel expanded": lambda x: x[:, :, :1, :1].expand_as(x),
    }


@pytest.mark.parametrize("view", views().values(), ids=views().keys())
def test_views(isa: str, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for partition in (PARTITIONS["ragged"], Partition.contiguous(64, 32, 2)):
        for name in ("1×1", "3×3", "strided"):
            x, *weight = operands(partition, GEOMETRIES[name])
            check(partition, GEOMETRIES[name], view(x), *weight, STORED[2])


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_ends_of_tiles(isa: str, layout: str) -> None:
    """Pixels, lanes and vectors of bytes on both sides of every size that something is cut at."""
    for width in (1, 2, 11, 12, 13, 14, 15, 28, 29, 63, 64, 65, 130):
        partition, geometry = Partition.random(20, 24, 2, seed=width), Geometry((1, width))
        x, *weight = operands(partition, geometry, 1)
        check(partition, geometry, LAYOUTS[layout](x), *weight, STORED[2])
    for channels in (1, 3, 4, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200):
        for partition in (
            Partition.random(channels, channels, 3, seed=channels, uneven=True),
            Partition.contiguous(channels, channels, 1),
            Partition.contiguous(channels, channels, channels),
        ):
            x, *weight = operands(partition, GEOMETRIES["3×3"], 1)
            check(partition, GEOMETRIES["3×3"], LAYOUTS[layout](x), *weight, STORED[1])


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33])
def test_groups_that_share_lanes(isa: str, outputs: int, layout: str) -> None:
    """Any number of groups of few outputs, with few and with many inputs, some of them empty."""
    for groups in (1, 2, 3, 5, 9, 16, 17):
        inputs = [list(range(g, 40, 1 + g % 7)) if g % 5 != 3 else [] for g in range(groups)]
        lists = [range(g * outputs, (g + 1) * outputs) for g in range(groups)]
        partition = Partition(40, groups * outputs, inputs, lists)
        x, *weight = operands(partition, Geometry((3, 5)), 1)
        check(partition, Geometry((3, 5)), LAYOUTS[layout](x), *weight, STORED[2])


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("sources", [29, 32, 36, 48, 63, 64, 65, 68, 96, 130])
def test_groups_of_many_sources(isa: str, sources: int, layout: str) -> None:
    """Whole products of matrix registers and what is left of them, beside groups that have none."""
    alike = Partition.contiguous(3 * sources, 144, 3)
    unlike = Partition(
        2 * sources + 5,
        110,
        [range(sources), range(sources, 2 * sources + 5), range(3), range(0, sources, 2)],
        [range(70), range(70, 87), range(87, 107), range(107, 110)],
    )
    for partition in (alike, unlike, Partition.random(3 * sources, 99, 3, seed=sources)):
        for width in (3, 4, 15, 17, 32, 49):
            geometry = Geometry((2, width), (1, 3), padding=(0, 0, 1, 1))
            x, *weight = operands(partition, geometry, 1)
            check(partition, geometry, LAYOUTS[layout](x), *weight, STORED[2])
            geometry = Geometry((1, width))
            first = weight[0][:, :, 1:2].contiguous()
            check(partition, geometry, LAYOUTS[layout](x[:, :, :1]), first, *weight[1:], None)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("run", [4, 8, 16, 32, 64])
def test_groups_of_several_runs(isa: str, run: int, layout: str) -> None:
    """Channels that are neighbours within a block or a quad, but not from one to the next."""
    lists = [[c for c in range(256) if c // run % 2 == g] for g in range(2)]
    straight = Partition.contiguous(256, 256, 2).inputs
    for inputs, outputs in ((lists, lists), (straight, lists), (lists, straight)):
        partition = Partition(256, 256, inputs, outputs)
        x, *weight = operands(partition, Geometry((3, 17)), 1)
        for stored in (None, STORED[2]):
            check(partition, Geometry((3, 17)), LAYOUTS[layout](x), *weight, stored)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("sign", [-128, 127])
def test_nothing_saturates_before_the_end(isa: str, sign: int, layout: str) -> None:
    """The largest products, side by side: sixteen bits would not hold two of them."""
    partition, geometry = Partition.contiguous(300, 40, 1), GEOMETRIES["3×3"]
    for value in (0, 255):
        x = torch.full((1, 300, *geometry.input_size), value, dtype=torch.uint8)
        weight = torch.full((partition.entries, 3, 3), sign, dtype=torch.int8)
        scale = torch.full((40,), 0.01)
        for zero_point in (0, 255):
            stored = Quantization(0.02, zero_point)
            y = check(
                partition, geometry, LAYOUTS[layout](x), weight, scale, None, None, None, stored
            )
            assert y.abs().max() == (300 * 9 * 255 * abs(sign) * 2e-4 if value != zero_point else 0)
            check(
                partition,
                geometry,
                LAYOUTS[layout](x),
                weight,
                scale,
                None,
                STORED[2],
                None,
                stored,
            )


def test_ties_are_rounded_to_even(isa: str) -> None:
    """One weight of 1, so that an output is half its input."""
    partition = Partition.contiguous(1, 1, 1)
    x = torch.arange(256).view(1, 1, 16, 16).byte()
    weight = torch.ones(1, 1, 1, dtype=torch.int8)
    prepared = prepare_weight(
        weight, torch.ones(1), partition=partition, read_as=Quantization(1.0, 0)
    )
    y = call(x, prepared, partition, Geometry((16, 16)), Quantization(2.0, 0))
    assert y.flatten()[:8].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_empty(isa: str, layout: str) -> None:
    partition = PARTITIONS["ragged"]
    for shape in ((0, 9, 4, 4), (2, 9, 0, 4)):
        geometry = Geometry((shape[2], 4), padding=(1, 1, 1, 1))
        x, *weight = operands(partition, geometry, shape[0])
        check(partition, geometry, LAYOUTS[layout](x), *weight, STORED[1])


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_the_same_on_any_number_of_threads(isa: str, layout: str) -> None:
    partition, geometry = Partition.random(96, 96, 3, seed=0), Geometry((31, 45), (3, 3))
    x, *weight = operands(partition, geometry, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(partition, geometry, LAYOUTS[layout](x), *weight, STORED[2])
            check(
                partition,
                Geometry((31, 45)),
                LAYOUTS[layout](x),
                weight[0][:, :1, :1],
                *weight[1:],
                None,
            )
    finally:
        torch.set_num_threads(before)


def draw(rng: random.Random) -> tuple[Partition, Geometry]:
    """Sizes at which something begins or ends more often than others."""
    sizes = (1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 48, 64, 70, 129)
    ins, outs, groups = rng.choice(sizes), rng.choice(sizes), rng.choice((1, 2, 3, 8, 20))
    kind = rng.randrange(3)
    if kind == 0:
        partition = Partition.random(ins, outs, groups, seed=rng.randrange(2**31), uneven=True)
    elif kind == 1:
        partition = (
            Partition.contiguous(ins * groups, outs * groups, groups)
            if (ins * groups <= 256 and outs * groups <= 256)
            else Partition.contiguous(ins, outs, 1)
        )
    else:
        labels = [rng.randrange(groups) for _ in range(outs)]
        partition = Partition(
            ins,
            outs,
            [rng.sample(range(ins), rng.randint(0, ins)) for _ in range(groups)],
            [[c for c in range(outs) if labels[c] == g] for g in range(groups)],
        )
    kernel, stride, dilation = (
        (rng.choice(at), rng.choice(at)) for at in ((1, 1, 3, 2), (1, 1, 1, 2, 3), (1, 1, 1, 2, 5))
    )
    padding = tuple(rng.choice((0, 0, 1, 2)) for _ in range(4))
    height, width = (
        max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1])
        + rng.choice((0, 0, 1, 6, 13, 20))
        for i in range(2)
    )
    return partition, Geometry((height, width), kernel, stride, padding, dilation)


def test_anything_at_random(isa: str) -> None:
    seed = int(os.environ["GROUPCONV_SEED"])
    for case in range(400):
        rng = random.Random(seed + case)
        torch.manual_seed(seed + case)
        partition, geometry = draw(rng)
        layout = rng.choice((*views().values(), LAYOUTS["NCHW"], LAYOUTS["channels_last"]))
        x, weight, scale, bias = operands(partition, geometry, rng.choice((1, 1, 2, 3)))
        stored = Quantization(0.01, rng.choice((0, 1, 128, 255)))
        try:
            check(
                partition,
                geometry,
                layout(x),
                weight,
                scale,
                rng.choice((bias, None)),
                rng.choice(STORED),
                rng.choice((None, "relu", "relu6")),
                stored,
            )
        except AssertionError as error:
            raise AssertionError(
                f"GROUPCONV_SEED={seed + case}: {partition}, {geometry}"
            ) from error


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "rows sliced"])
def test_quantize(isa: str, layout: str) -> None:
    for count in (1, 15, 63, 64, 65, 1000, 70000):
        x = LAYOUTS[layout](20 * torch.randn(1, 1, 2, count))
        for quantization in (Quantization(0.1, 128), Quantization(3.7, 0), Quantization(1e-3, 255)):
            scale, zero_point = quantization
            factor = torch.tensor(1 / scale, dtype=torch.float32)
            low, high = -zero_point, 255 - zero_point
            expected = ((x * factor).clamp(low, high).round() + zero_point).byte()
            found = quantization.quantize(x)
            assert torch.equal(found, expected)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -0.0]).view(1, 1, 1, 6)
    assert Quantization(1.0, 7).quantize(strange).flatten().tolist() == [0, 255, 0, 255, 0, 7]


def test_images_keep_their_layout(isa: str) -> None:
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    q = INPUT.quantize(x)
    assert q.is_contiguous(memory_format=torch.channels_last)
    partition = Partition.contiguous(5, 7, 1)
    weight = torch.ones(35, 1, 1, dtype=torch.int8)
    prepared = prepare_weight(weight, torch.ones(7), partition=partition, read_as=INPUT)
    for output in (None, INPUT):
        y = quantized_conv2d(q, prepared, partition=partition, write_as=output)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y = quantized_conv2d(q.contiguous(), prepared, partition=partition, write_as=output)
        assert y.is_contiguous()


# ---- the raw operations refuse what does not fit -------------------------------------------------


def test_operations_refuse_nonsense() -> None:
    partition, geometry = PARTITIONS["ragged"], GEOMETRIES["3×3"]
    x, weight, scale, bias = operands(partition, geometry)
    good = prepare_weight(weight, scale, bias, partition=partition, read_as=INPUT)
    for wrong, message in (
        (good._replace(packed=good.packed[:-1]), "quantized_pack"),
        (good._replace(packed=good.packed.view(torch.uint8)), "int8"),
        (good._replace(packed=good.packed.repeat(2)[::2]), "quantized_pack"),
        (good._replace(start=good.start[1:]), "start"),
        (good._replace(start=good.start.long()), "start must be a int32"),
        (good._replace(scale=good.scale[None]), "scale"),
        (good._replace(scale=good.scale * torch.nan), "finite"),
        (good._replace(read_as=Quantization(1.0, 256)), "input_zero_point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(x, wrong, partition, geometry)
    for output in (Quantization(0.0, 0), Quantization(1.0, -1), Quantization(float("nan"), 1)):
        with pytest.raises(RuntimeError, match="output_"):
            call(x, good, partition, geometry, output)
    with pytest.raises(RuntimeError, match="uint8"):
        call(x.float(), good, partition, geometry)
    with pytest.raises(RuntimeError, match="channels"):
        call(x[:, 1:], good, partition, geometry)
    with pytest.raises(RuntimeError, match="int8"):
        _ops.quantized_pack(weight.int(), partition.cpu_table, 9, 7)
    with pytest.raises(RuntimeError, match="float32"):
        _ops.quantize(x, 1.0, 0)
    with pytest.raises(RuntimeError, match="scale"):
        _ops.quantize(x.float(), 0.0, 0)


def test_opcheck() -> None:
    partition, geometry = PARTITIONS["permuted"], GEOMETRIES["strided"]
    x, weight, scale, bias = operands(partition, geometry)
    good = prepare_weight(weight, scale, bias, partition=partition, read_as=INPUT)
    for layout in (LAYOUTS["NCHW"], LAYOUTS["channels_last"]):
        for floating in (False, True):
            torch.library.opcheck(
                torch.ops.groupconv.quantized_conv2d.default,
                (
                    layout(x),
                    good.packed,
                    good.start,
                    good.scale,
                    partition.cpu_table,
                    8,
                    3,
                    2,
                    *window_of(geometry),
                    1,
                    37,
                    0.1,
                    5,
                    floating,
                ),
            )
        torch.library.opcheck(torch.ops.groupconv.quantize.default, (layout(x).float(), 0.5, 3))
    torch.library.opcheck(
        torch.ops.groupconv.quantized_pack.default, (weight, partition.cpu_table, 12, 8)
    )
