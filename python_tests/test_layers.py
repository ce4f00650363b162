"""The layers of fixed structure: two-level, IGC V1, V2 and V3, separable; each equals one dense
convolution, and depthwise separable, Xception, regular convolution and summation fusion are IGC
blocks.
"""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import ISAS, LAYOUTS, forced_isa
from torch import nn
from torch.nn import functional

from groupconv_ext import Partition, _ops
from groupconv_ext.nn import (
    DepthwiseSeparableConv2d,
    IGCV2Conv2d,
    IGCV3Block,
    InterleavedConv2d,
    TwoLevelConv2d,
    XceptionConv2d,
    balanced,
    complementary,
    compose,
)

DOUBLE = {"dtype": torch.float64}

COMPOSED: dict[str, Callable[..., nn.Module]] = {
    "two-level": lambda **o: TwoLevelConv2d(12, 18, 3, groups=3, **o),
    "two-level, one group": lambda **o: TwoLevelConv2d(12, 6, 3, **o),
    "two-level, channelwise": lambda **o: TwoLevelConv2d(12, 12, (3, 1), groups=12, **o),
    "IGC": lambda **o: InterleavedConv2d(12, 18, 3, primary_groups=3, **o),
    "IGC L=1": lambda **o: InterleavedConv2d(12, 12, 3, primary_groups=1, **o),
    "IGC M=2": lambda **o: InterleavedConv2d(12, 18, 3, primary_groups=3, secondary_groups=2, **o),
    "IGCV2": lambda **o: IGCV2Conv2d(12, 24, 3, branch_channels=[2, 2, 3], **o),
    "IGCV2, balanced": lambda **o: IGCV2Conv2d(12, 12, 3, stages=3, **o),
    "IGCV2, not complementary": lambda **o: IGCV2Conv2d(12, 24, 3, branch_channels=4, **o),
    "IGCV2, one stage": lambda **o: IGCV2Conv2d(12, 24, 3, branch_channels=12, **o),
}
WINDOWS = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": (2, 0), "dilation": 2, "bias": False},
    {"padding": "same"},
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_is_the_dense_convolution_that_it_composes(
    name: str, window: dict[str, object], backend: str
) -> None:
    layer = COMPOSED[name](**window, **DOUBLE, backend=backend)
    x = torch.randn(2, 12, 9, 8, **DOUBLE, requires_grad=True)
    leaves = [x, *layer.parameters()]
    y = layer(x)
    settings = {key: value for key, value in window.items() if key != "bias"}
    expected = functional.conv2d(x, layer.compose(), layer.bias, **settings)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


# ---- two-level ----------------------------------------------------------------------------------


def test_two_level_is_its_formula() -> None:
    """y_k = A_k x_k + S_k z with z_k = R_k x_k, group by group."""
    layer = TwoLevelConv2d(8, 12, 3, 2, 1, groups=4, **DOUBLE)
    x = torch.randn(2, 8, 7, 6, **DOUBLE)
    parts = x.split(2, 1)
    rows = zip(parts, layer.restriction, strict=True)
    z = torch.cat([functional.conv2d(part, row[None], None, 2, 1) for part, row in rows], 1)
    y = [
        functional.conv2d(part, weight, bias, 2, 1) + functional.conv2d(z, coarse[:, :, None, None])
        for part, weight, bias, coarse in zip(
            parts, layer.weight.split(3), layer.bias.split(3), layer.coarse.split(3), strict=True
        )
    ]
    torch.testing.assert_close(layer(x), torch.cat(y, 1))


LARGE: dict[str, Callable[[], nn.Module]] = {
    "two-level": lambda: TwoLevelConv2d(48, 96, 3, 2, 1, groups=4),
    "two-level, 1×1": lambda: TwoLevelConv2d(96, 96, 1, groups=8),
    "IGC": lambda: InterleavedConv2d(48, 48, 3, padding=1, primary_groups=8),
    "IGCV2": lambda: IGCV2Conv2d(64, 64, 3, padding=1, branch_channels=8),
    "separable": lambda: DepthwiseSeparableConv2d(48, 80, 3, padding=1, groups=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_on_any_number_of_threads(name: str, layout: str, dtype: torch.dtype) -> None:
    """In inference and in training, of maps that several threads share."""
    layer = LARGE[name]().to(dtype)
    x = LAYOUTS[layout](torch.randn(3, layer.in_channels, 29, 30, dtype=dtype)).requires_grad_()

    def run(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        with torch.no_grad():
            inferred = layer(x)
        y = layer(x)
        return [inferred, y.detach(), *torch.autograd.grad(y.sum(), (x, *layer.parameters()))]

    before = torch.get_num_threads()
    try:
        alone = run(1)
        for count in (2, 3, 8):
            assert all(map(torch.equal, run(count), alone)), f"{count} threads"
    finally:
        torch.set_num_threads(before)


def test_two_level_parameters_are_the_papers() -> None:
    """d²mn/N of A, d²n of R, mN of S; table 1's whole WideResNets are built from these."""
    layer = TwoLevelConv2d(160, 320, 3, groups=8, bias=False)
    assert layer.weight.numel() == 9 * 160 * 320 // 8
    assert layer.restriction.numel() == 9 * 160
    assert layer.coarse.shape == (320, 8)


def test_two_level_without_the_coarse_level_is_a_group_convolution() -> None:
    layer = TwoLevelConv2d(12, 18, 3, padding=1, groups=3, padding_mode="reflect", **DOUBLE)
    nn.init.zeros_(layer.coarse)
    plain = nn.Conv2d(12, 18, 3, padding=1, groups=3, padding_mode="reflect", **DOUBLE)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(2, 12, 5, 6, **DOUBLE)
    torch.testing.assert_close(layer(x), plain(x))


# ---- IGC V1 and what it contains ----------------------------------------------------------------


def test_interleaved_is_permute_convolve_permute() -> None:
    layer = InterleavedConv2d(12, 12, 3, padding=1, bias=False, primary_groups=4, **DOUBLE)
    x = torch.randn(2, 12, 5, 6, **DOUBLE)
    y = functional.conv2d(x, layer.primary, None, 1, 1, 1, 4)
    to_secondary = torch.tensor([4 * 0 + c for m in range(3) for c in range(m, 12, 3)])
    y = functional.conv2d(y[:, to_secondary], layer.secondary, groups=3)
    torch.testing.assert_close(layer(x), y[:, to_secondary.argsort()])
    L, M, S = 4, 3, 9
    assert sum(p.numel() for p in layer.parameters()) == L * M * M * S + M * L * L  # eq. 7


def test_depthwise_separable_is_an_interleaved_block() -> None:
    separable = DepthwiseSeparableConv2d(6, 6, 3, 2, 1, **DOUBLE)
    block = InterleavedConv2d(6, 6, 3, 2, 1, primary_groups=6, **DOUBLE)  # M = 1
    assert block.partitions["secondary"].groups == 1
    with torch.no_grad():
        block.primary.copy_(separable.depthwise)
        block.secondary.copy_(separable.pointwise)
        block.bias.copy_(separable.bias)
    x = torch.randn(2, 6, 7, 8, **DOUBLE)
    torch.testing.assert_close(block(x), separable(x))


def test_xception_is_an_interleaved_block_in_the_other_order() -> None:
    """A pointwise and a channelwise convolution: L = 1 with a 1×1 primary, then M = C."""
    xception = XceptionConv2d(6, 8, 3, padding=1, bias=False, **DOUBLE)
    x = torch.randn(2, 6, 7, 8, **DOUBLE)
    block = InterleavedConv2d(6, 8, 1, bias=False, primary_groups=1, **DOUBLE)
    assert block.partitions["secondary"].groups == 8
    # The secondary convolution carries the window here (igcv1, section 4, "Extensions").
    with torch.no_grad():
        block.primary.copy_(xception.pointwise)
        block.secondary.fill_(1)
    spatial = functional.conv2d(block(x), xception.depthwise, None, 1, 1, 1, 8)
    torch.testing.assert_close(spatial, xception(x))


@pytest.mark.parametrize("bias", [True, False])
def test_separable_layers_are_two_convolutions(bias: bool) -> None:
    x = torch.randn(2, 6, 7, 8, **DOUBLE)
    layer = DepthwiseSeparableConv2d(6, 8, 3, 2, 1, bias=bias, **DOUBLE)
    y = functional.conv2d(x, layer.depthwise, None, 2, 1, 1, 6)
    torch.testing.assert_close(layer(x), functional.conv2d(y, layer.pointwise, layer.bias))
    other = XceptionConv2d(6, 8, 3, 2, 1, groups=2, bias=bias, **DOUBLE)
    y = functional.conv2d(x, other.pointwise, groups=2)
    expected = functional.conv2d(y, other.depthwise, other.bias, 2, 1, 1, 8)
    torch.testing.assert_close(other(x), expected)


def test_a_regular_convolution_is_an_interleaved_block() -> None:
    """igcv1, eq. 17-20: the input twice, blocks W_ij as primary groups, and a fixed crossing."""
    half = 3
    weight = torch.randn(2 * half, 2 * half, 3, 3, **DOUBLE)
    block = InterleavedConv2d(
        4 * half, 4 * half, 3, padding=1, bias=False, primary_groups=4, **DOUBLE
    )
    blocks = [weight[i * half :][:half, j * half :][:, :half] for i in (0, 1) for j in (0, 1)]
    crossing = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 2, **DOUBLE)
    with torch.no_grad():
        block.primary.copy_(torch.cat(blocks))
        block.secondary.copy_(crossing.repeat(half, 1)[:, :, None, None])
    x = torch.randn(2, 2 * half, 5, 6, **DOUBLE)
    y = functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(block(torch.cat((x, x), 1)), torch.cat((y, y), 1))


def test_summation_fusion_is_an_interleaved_block() -> None:
    """igcv1, eq. 21-22: branches added up, the sum handed to all of them: W^d all ones."""
    block = InterleavedConv2d(12, 12, 3, padding=1, bias=False, primary_groups=4, **DOUBLE)
    nn.init.ones_(block.secondary)
    x = torch.randn(2, 12, 5, 6, **DOUBLE)
    branches = [
        functional.conv2d(part, weight, padding=1)
        for part, weight in zip(x.split(3, 1), block.primary.split(3), strict=True)
    ]
    torch.testing.assert_close(block(x), sum(branches).repeat(1, 4, 1, 1))


# ---- IGC V2 and its conditions ------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "sizes"), [(64, (8, 8)), (64, (4, 4, 4)), (12, (2, 2, 3))])
def test_branches_of_digits_are_complementary(channels: int, sizes: tuple[int, ...]) -> None:
    layer = IGCV2Conv2d(channels, channels, 3, padding=1, branch_channels=sizes)
    pointwise = list(layer.partitions.values())[1:]
    assert complementary(pointwise)
    assert [p.sizes[0] for p in pointwise] == [(k, k) for k in sizes]
    assert not complementary(pointwise[:-1])
    assert not complementary([*pointwise, pointwise[0]])
    assert (layer.compose() != 0).all()


def test_one_branch_size_takes_as_many_stages_as_connect_everything() -> None:
    for channels, size in ((64, 8), (128, 8), (512, 8), (24, 4)):
        layer = IGCV2Conv2d(channels, channels, 3, branch_channels=size)
        assert len(layer.stages) == math.ceil(math.log(channels, size) - 1e-9)
        paths = torch.eye(channels)
        for partition in list(layer.partitions.values())[1:]:
            paths = partition.mask(torch.float32) @ paths
        assert (paths > 0).all()


def test_balanced_has_the_fewest_weights() -> None:
    """Against every factorisation there is."""
    assert balanced(64, 1, 2) == (8, 8)
    assert balanced(7, 9, 1) == (7,)
    for channels, window, stages in ((64, 9, 3), (36, 9, 2), (96, 1, 3), (30, 4, 3)):
        divisors = [k for k in range(1, channels + 1) if channels % k == 0]
        costs = {
            sizes: window * sizes[0] + sum(sizes[1:])
            for sizes in itertools.product(divisors, repeat=stages)
            if math.prod(sizes) == channels
        }
        found = balanced(channels, window, stages)
        assert costs[found] == min(costs.values())


def test_compose_refuses_two_windows() -> None:
    p = Partition.contiguous(4, 4, 2)
    with pytest.raises(ValueError, match="at most one larger than 1×1"):
        compose([torch.zeros(8, 3, 3)] * 2, [p, p])
    with pytest.raises(ValueError, match="1 weights and 2 partitions"):
        compose([torch.zeros(8, 3, 3)], [p, p])


# ---- IGC V3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_shuffle", [False, True])
def test_igcv3_block_is_its_parts(second_shuffle: bool) -> None:
    block = IGCV3Block(8, 8, second_shuffle=second_shuffle).double().eval()
    for norm in (block.expand_norm, block.depthwise_norm, block.project_norm):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 5, 6, **DOUBLE)
    weights = [
        layer.weight.view(layer.out_channels, -1, *layer.kernel_size)
        for layer in (block.expand, block.depthwise, block.project)
    ]
    shuffle = nn.ChannelShuffle(2)
    y = block.expand_norm(shuffle(functional.conv2d(x, weights[0], groups=2)))
    y = functional.conv2d(y, weights[1], padding=1, groups=48)
    y = functional.relu6(block.depthwise_norm(y))
    y = functional.conv2d(y, weights[2], groups=2)
    y = x + block.project_norm(shuffle(y) if second_shuffle else y)
    torch.testing.assert_close(block(x), y)


def test_igcv3_network_has_the_released_networks_parameters() -> None:
    rows = ((1, 16, 1, 1), (6, 24, 4, 2), (6, 32, 6, 2), (6, 64, 8, 2), (6, 96, 6, 1),
            (6, 160, 6, 2), (6, 320, 1, 1))  # fmt: skip
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)]
    channels = 32
    for expansion, width, repeats, stride in rows:
        for first in range(repeats):
            layers.append(IGCV3Block(channels, width, 1 if first else stride, expansion))
            assert layers[-1].skip == (first > 0)
            channels = width
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.Linear(1280, 1000)]
    assert sum(p.numel() for p in nn.Sequential(*layers).parameters()) == 3_491_688


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoLevelConv2d(8, 8, 3, groups=3), "groups = 3 does not divide in_channels = 8"),
        (lambda: TwoLevelConv2d(8, 8, 3, groups=16), "groups = 16 does not divide"),
        (lambda: TwoLevelConv2d(8, 8, 3, backend="fast"), "backend is 'fast'"),
        (lambda: TwoLevelConv2d(8, 8, 3, padding_mode="odd"), "padding_mode is 'odd'"),
        (lambda: InterleavedConv2d(8, 8, 3, primary_groups=3), "groups = 3 does not divide"),
        (lambda: InterleavedConv2d(8, 8, 3, groups=2, primary_groups=2), "groups is 2; expected 1"),
        (
            lambda: InterleavedConv2d(8, 8, 3, primary_groups=2, secondary_groups=5),
            "groups = 5 does not divide",
        ),
        (
            lambda: IGCV2Conv2d(64, 64, 3, branch_channels=7),
            "branch_channels = 7 does not divide in_channels = 64",
        ),
        (lambda: IGCV2Conv2d(64, 60, 3, branch_channels=8), "out_channels = 60 is no multiple"),
        (lambda: IGCV2Conv2d(64, 64, 3, branch_channels=[8, 8], stages=3), "has 2 entries"),
        (lambda: IGCV2Conv2d(64, 64, 3, branch_channels=[]), "has 0 entries"),
        (lambda: IGCV2Conv2d(64, 64, 3, stages=0), "stages is 0"),
        (lambda: IGCV2Conv2d(64, 64, 3, groups=2), "groups is 2; expected 1"),
        (lambda: IGCV3Block(8, 16, skip=True), "skip is True for 8 → 16"),
        (lambda: IGCV3Block(7, 16), "groups = 2 does not divide"),
        (lambda: balanced(0, 1, 2), "channels is 0"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_two_level_refuses_other_channels_in_the_name_of_its_groups() -> None:
    layer = TwoLevelConv2d(8, 12, 3, groups=2)
    said = r"x has 6 channels; expected 8 for Partition\(8→12"
    with pytest.raises(ValueError, match=said) as error:
        layer(torch.randn(1, 6, 5, 5))
    assert error.value.__context__ is None


# ---- the raw operation --------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
@pytest.mark.parametrize("isa", ISAS)
def test_two_level_operation_on_every_instruction_set(isa: str) -> None:
    layer = TwoLevelConv2d(12, 18, 3, 2, 1, groups=3)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for layout in ("NCHW", "channels_last", "columns sliced"):
            x = LAYOUTS[layout](torch.randn(2, 12, 9, 8).to(dtype))
            with forced_isa(isa), torch.no_grad():
                y = layer.to(dtype)(x)
            twin = copy.deepcopy(layer).double()
            torch.testing.assert_close(y.double(), twin(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.native
@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "groups", "window", "stride", "size"),
    [
        pytest.param((12, 18), 3, (3, 3), 1, (9, 11), id="rows without gaps"),
        pytest.param((8, 96), 2, (3, 3), 1, (67, 45), id="several tiles an image"),
        pytest.param((8, 10), 2, (1, 1), 1, (7, 9), id="pointwise"),
        pytest.param((8, 10), 2, (3, 1), 1, (9, 7), id="rows that touch"),
        pytest.param((12, 18), 3, (3, 3), 2, (9, 8), id="strided"),
        pytest.param((32, 128), 2, (3, 3), 1, (7, 7), id="one by one"),
        pytest.param((32, 144), 2, (3, 3), 1, (8, 8), id="one by one, a last vector in part"),
        pytest.param((64, 64), 1, (3, 3), 2, (14, 14), id="one by one, one group"),
    ],
)
def test_two_level_operation_is_three_convolutions(
    isa: str,
    layout: str,
    channels: tuple[int, int],
    groups: int,
    window: tuple[int, int],
    stride: int,
    size: tuple[int, int],
) -> None:
    padding = (window[0] // 2, window[1] // 2)
    layer = TwoLevelConv2d(*channels, window, stride, padding, groups=groups)
    x = LAYOUTS[layout](torch.randn(3, channels[0], *size))
    with forced_isa(isa), torch.no_grad():
        y = layer(x)
    x, weight, restriction, coarse = (
        t.detach().double() for t in (x, layer.weight, layer.restriction, layer.coarse)
    )
    assert layer.bias is not None
    settings = (stride, padding, 1, groups)
    z = functional.conv2d(x, restriction, None, *settings)
    expected = functional.conv2d(x, weight, layer.bias.detach().double(), *settings)
    expected += functional.conv2d(z, coarse[:, :, None, None])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_ops.unavailable is not None, reason=str(_ops.unavailable))
def test_two_level_operation_checks_its_operands() -> None:
    partition = Partition.contiguous(4, 6, 2)
    x, weight, coarse = torch.randn(1, 4, 5, 5), torch.randn(12, 3, 3), torch.randn(6, 2)
    restriction, table = torch.randn(4, 3, 3), partition.cpu_table
    window = (1, 1, 1, 1, 1, 1, 1, 1)
    good = [x, weight, restriction, coarse, None, table, *window]
    operation = torch.ops.groupconv.two_level
    torch.library.opcheck(operation.default, good)
    for at, value, message in (
        (1, weight[:-1], "weight must have sizes"),
        (2, restriction[:-1], "restriction must have sizes"),
        (2, torch.randn(4, 1, 1), "restriction must have sizes"),
        (3, torch.zeros(6), "coarse must have sizes"),
        (3, torch.zeros(7, 2), "the operands have 4 and 7"),
        (3, torch.zeros(6, 3), "coarse has 3 columns"),
        (4, torch.zeros(5), "bias must have sizes"),
        (0, x.double(), "another dtype"),
    ):
        bad = list(good)
        bad[at] = value
        with pytest.raises(RuntimeError, match=message):
            operation(*bad)
