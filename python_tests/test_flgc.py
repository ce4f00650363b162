"""FLGC layers: exact sparse training, freezing, and everything a layer has to survive."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import groupconv_ext as gc
from groupconv_ext.nn import FLGConv1d, FLGConv2d, GroupedLayer, PartitionedConv1d
from groupconv_ext.partition import Partition


class MaskedDense(nn.Module):
    """What people write: softmax, one-hot, a dense mask and three dense convolutions."""

    def __init__(self, layer: FLGConv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.input_logits = nn.Parameter(layer.input_logits.detach().clone())
        self.output_logits = nn.Parameter(layer.output_logits.detach().clone())
        self.layer = [layer]

    def assignments(self, logits: torch.Tensor) -> torch.Tensor:
        soft = logits.softmax(1)
        hard = functional.one_hot(logits.argmax(1), logits.shape[1]).to(soft.dtype)
        if self.layer[0].gradient == "winner":
            return hard + hard * (soft - soft.detach())
        return hard + soft - soft.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.assignments(self.output_logits) @ self.assignments(self.input_logits).T
        mask = mask[:, :, None, None]
        if self.layer[0].weight_gradient == "masked":
            weight = self.weight * mask
        else:
            weight = self.weight.detach() * mask + self.weight - self.weight.detach()
        layer = self.layer[0]
        return functional.conv2d(x, weight, self.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("weight_gradient", ["straight_through", "masked"])
@pytest.mark.parametrize("gradient", ["straight_through", "winner"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_training_is_that_of_the_masked_dense_layer(
    kernel: int, stride: int, gradient: str, weight_gradient: str
) -> None:
    layer = FLGConv2d(
        12,
        16,
        kernel,
        stride,
        kernel // 2,
        groups=4,
        gradient=gradient,
        weight_gradient=weight_gradient,
        dtype=torch.float64,
    )
    naive = MaskedDense(layer)
    target = nn.Conv2d(12, 16, kernel, stride, kernel // 2, groups=4, dtype=torch.float64)
    pairs = [
        torch.optim.SGD(module.parameters(), lr=0.4, momentum=0.9) for module in (layer, naive)
    ]
    partitions = {layer.partition()}
    for step in range(60):
        x = torch.randn(4, 12, 6, 6, dtype=torch.float64)
        losses = []
        for module, optimizer in zip((layer, naive), pairs, strict=True):
            optimizer.zero_grad()
            loss = (module(x) - target(x).detach()).square().mean() * 8
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
        for name, parameter in naive.named_parameters():
            own = layer.get_parameter(name)
            torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(own, parameter, rtol=1e-8, atol=1e-10, msg=f"{step} {name}")
        partitions.add(layer.partition())
    if gradient == "straight_through":
        assert len(partitions) > 3, "no channel ever changed its group: the test shows nothing"


@pytest.mark.parametrize("groups", [1, 3, 20])
def test_it_is_the_convolution_of_its_partition(groups: int) -> None:
    layer = FLGConv2d(8, 12, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 5, 5)
    partition = layer.partition()
    assert partition.groups == groups
    expected = functional.conv2d(
        x, layer.weight * partition.mask()[:, :, None, None], layer.bias, padding=1
    )
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.deployed()(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])


def test_all_channels_in_one_group() -> None:
    everything = Partition.from_labels([2] * 6, [2] * 4, 3)
    layer = FLGConv2d(6, 4, 1, partition=everything)
    assert layer.partition() == everything
    x = torch.randn(1, 6, 3, 3)
    torch.testing.assert_close(layer(x), functional.conv2d(x, layer.weight, layer.bias))


def test_inputs_and_filters_that_never_meet() -> None:
    layer = FLGConv2d(6, 4, 1, partition=Partition.from_labels([0] * 6, [1] * 4, 2))
    x = torch.randn(1, 6, 3, 3, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias[:, None, None].expand_as(y))
    y.sum().backward()
    assert not x.grad.any()
    assert layer.weight.grad.any()  # straight-through: so that they can meet one day


@pytest.mark.parametrize("seed", range(3))
def test_starting_from_a_partition(seed: int) -> None:
    partition = Partition.random(30, 20, 5, seed=seed, uneven=True)
    layer = FLGConv2d(30, 20, 1, partition=partition)
    assert layer.groups == 5
    assert layer.partition() == partition
    assert 0.8 < layer.input_logits.std() < 1.2


def test_a_start_that_no_labels_describe_is_refused() -> None:
    overlapping = Partition(4, 2, [[0, 1], [1, 2]], [[0], [1]])
    with pytest.raises(ValueError, match="exactly one"):
        FLGConv2d(4, 2, 1, partition=overlapping)
    with pytest.raises(ValueError, match="contradicts"):
        FLGConv2d(4, 4, 1, groups=3, partition=Partition.contiguous(4, 4, 2))
    with pytest.raises(ValueError, match=r"in_channels, out_channels = 5, 4"):
        FLGConv2d(5, 4, 1, partition=Partition.contiguous(4, 4, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"gradient": "hard"}, "gradient is 'hard'"),
        ({"weight_gradient": None}, "weight_gradient is None"),
        ({"update_every": 0}, "update_every is 0"),
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
        ({"padding_mode": "none"}, "padding_mode is 'none'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FLGConv2d(4, 4, 1, **arguments)


@pytest.mark.parametrize("name", ["input_logits", "output_logits"])
def test_diverged_logits_name_the_layer(name: str) -> None:
    layer = FLGConv2d(6, 4, 1, groups=2)
    with torch.no_grad():
        layer.get_parameter(name)[1, 0] = torch.nan
    blamed = rf"FLGConv2d\(6, 4, groups=2\)\.{name} has nan"
    with pytest.raises(ValueError, match=blamed):
        layer(torch.randn(1, 6, 2, 2))
    with pytest.raises(ValueError, match=blamed):
        layer.partition()
    with pytest.raises(ValueError, match=blamed):
        layer.deployed()


# ---- freezing -----------------------------------------------------------------------------------


def test_freezing() -> None:
    layer = FLGConv2d(12, 8, 3, padding=1, groups=3)
    assert isinstance(layer, GroupedLayer)
    x = torch.randn(2, 12, 5, 5)
    before = layer(x)
    before.sum().backward()
    partition = layer.partition()
    layer.freeze_structure()
    assert layer.frozen
    assert layer.partition() == partition
    torch.testing.assert_close(layer(x), before)
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.input_logits.grad is None
    assert layer.output_logits.grad is None
    assert not layer.weight.grad[~partition.mask()].any()
    assert layer.weight.grad[partition.mask()].all()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.5, momentum=0.9)
    logits = layer.input_logits.detach().clone()
    optimizer.step()
    assert torch.equal(layer.input_logits, logits)


def test_the_structure_is_updated_every_third_step() -> None:
    layer = FLGConv2d(12, 8, 1, groups=3, update_every=3)
    x = torch.randn(2, 12, 5, 5)
    learned = []
    for _ in range(7):
        layer.zero_grad()
        layer(x).square().sum().backward()
        off = layer.weight.grad[~layer.partition().mask()]
        assert bool(off.any()) == (layer.input_logits.grad is not None)
        learned.append(layer.input_logits.grad is not None)
    assert learned == [True, False, False, True, False, False, True]
    assert layer.get_extra_state().tolist() == [0, 7]
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.train()(x)
    assert layer.get_extra_state().tolist() == [0, 7]


@pytest.mark.parametrize("which", [0, 1])
def test_a_masked_gradient_stays_masked_whatever_learns(which: int) -> None:
    layer = FLGConv2d(9, 6, 3, groups=3, weight_gradient="masked")
    x = torch.randn(2, 9, 5, 5)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    mask = layer.partition().mask()
    assert not expected[~mask].any()
    for kept in (layer.structure_parameters()[which:][:1], layer.structure_parameters()):
        layer.zero_grad()
        for parameter in kept:
            parameter.requires_grad_(False)
        layer(x).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected)
        assert not layer.weight.grad[~mask].any()
        assert all(parameter.grad is None for parameter in kept)


# ---- what every layer has to survive ------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dict(frozen: bool) -> None:
    layer, other = (FLGConv2d(9, 6, 3, groups=3) for _ in range(2))
    if frozen:
        layer.freeze_structure()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert set(layer.state_dict()) == {
        *("weight", "bias", "input_logits", "output_logits", "_extra_state")
    }
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.frozen == frozen
    assert other.partition() == layer.partition()
    x = torch.randn(1, 9, 5, 5)
    assert torch.equal(other(x), layer(x))
    # A frozen layer adopts the groups of what it loads, and one that learns goes on learning.
    third = FLGConv2d(9, 6, 3, groups=3)
    other.load_state_dict(third.state_dict())
    assert not other.frozen
    assert other.input_logits.requires_grad
    assert other.partition() == third.partition()


def test_a_checkpoint_goes_on_counting() -> None:
    layer, other = (FLGConv2d(9, 6, 1, groups=3, update_every=3) for _ in range(2))
    x = torch.randn(1, 9, 5, 5)

    def learns(layer: FLGConv2d) -> bool:
        layer.zero_grad()
        layer(x).sum().backward()
        return layer.input_logits.grad is not None

    assert [learns(layer) for _ in range(2)] == [True, False]
    other.load_state_dict(layer.state_dict())
    assert [learns(other) for _ in range(3)] == [False, True, False]
    state = layer.state_dict()
    state["_extra_state"] = torch.tensor(True)
    with pytest.raises(ValueError, match=r"the checkpoint's state is torch.bool of shape \[\]"):
        other.load_state_dict(state)


def test_a_checkpoint_that_knows_no_freezing_loads() -> None:
    layer, other = (FLGConv2d(9, 6, 3, groups=3) for _ in range(2))
    state = {name: value for name, value in other.state_dict().items() if "extra" not in name}
    layer.load_state_dict(state)
    assert layer.partition() == other.partition()


@pytest.mark.parametrize("frozen", [False, True])
def test_deepcopy(frozen: bool) -> None:
    layer = FLGConv2d(9, 6, 1, groups=3)
    if frozen:
        layer.freeze_structure()
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 9, 5, 5)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast(kernel: int, frozen: bool) -> None:
    layer = FLGConv2d(32, 24, kernel, groups=4)
    if frozen:
        layer.freeze_structure()
    x = torch.randn(2, 32, 7, 7, requires_grad=True)
    exact = layer(x)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(exact.sum(), [x, *weights])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    for grad, expected in zip(torch.autograd.grad(y.sum(), [x, *weights]), grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected, rtol=0.1, atol=0.03 * expected.abs().max())


@pytest.mark.parametrize("frozen", [False, True])
def test_channels_last(frozen: bool) -> None:
    layer = FLGConv2d(16, 12, 3, padding=1, groups=4)
    if frozen:
        layer.freeze_structure()
    x = torch.randn(2, 16, 6, 6)
    y = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    last.sum().backward()
    assert layer.weight.grad.any()


def test_meta() -> None:
    layer = FLGConv2d(16, 12, 3, padding=1, groups=4, device="meta")
    assert layer(torch.empty(2, 16, 6, 6, device="meta")).shape == (2, 12, 6, 6)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(2, 16, 6, 6)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_compile_as_one_graph(frozen: bool) -> None:
    model = nn.Sequential(
        FLGConv2d(8, 12, 1, groups=3), nn.ReLU(), FLGConv2d(12, 8, 3, padding=1, groups=2)
    )
    if frozen:
        for layer in model[::2]:
            layer.freeze_structure()
    compiled = torch.compile(model, fullgraph=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = torch.randn(2, 8, 6, 6)
    for _ in range(3):  # the groups change, the graph stays
        y, eager = compiled(x), model(x)
        torch.testing.assert_close(y, eager)
        grads = torch.autograd.grad(y.square().sum(), parameters)
        for grad, expected in zip(
            grads, torch.autograd.grad(eager.square().sum(), parameters), strict=True
        ):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            model[0].input_logits.normal_()
            if frozen:
                break


@pytest.mark.parametrize("padding", [0, 2, "same"])
def test_one_dimension(padding: int | str) -> None:
    layer = FLGConv1d(8, 6, 3, padding=padding, dilation=2, groups=2, dtype=torch.float64)
    x = torch.randn(2, 8, 11, dtype=torch.float64, requires_grad=True)
    mask = layer.partition().mask()[:, :, None]
    expected = functional.conv1d(x, layer.weight * mask, layer.bias, 1, padding, 2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    assert isinstance(layer.deployed(), PartitionedConv1d)
    torch.testing.assert_close(layer.deployed()(x), expected)
    layer.freeze_structure()
    torch.testing.assert_close(layer(x), expected)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], grad)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode: str) -> None:
    layer = FLGConv2d(8, 6, 3, padding=1, groups=2, padding_mode=mode)
    x = torch.randn(2, 8, 5, 5)
    padded = functional.pad(x, (1, 1, 1, 1), mode=mode)
    mask = layer.partition().mask()[:, :, None, None]
    expected = functional.conv2d(padded, layer.weight * mask, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.deployed()(x), expected)


def test_the_dense_way_is_the_same() -> None:
    layer = FLGConv2d(8, 6, 3, groups=2, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    twin.backend = "dense"
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    for frozen in (False, True):
        if frozen:
            layer.freeze_structure()
            twin.freeze_structure()
        parameters = [[p for p in m.parameters() if p.requires_grad] for m in (layer, twin)]
        grads = [
            torch.autograd.grad(module(x).square().sum(), wanted)
            for module, wanted in zip((layer, twin), parameters, strict=True)
        ]
        for own, other in zip(*grads, strict=True):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_count_a_step_twice(reentrant: bool) -> None:
    layer, plain = (FLGConv2d(4, 4, 1, groups=2, update_every=2) for _ in range(2))
    learned: dict[nn.Module, list[bool]] = {layer: [], plain: []}
    for step in range(6):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        for module in (layer, plain):
            module.zero_grad()
            y = module(x) if module is plain else checkpoint(module, x, use_reentrant=reentrant)
            y.square().sum().backward()
            learned[module].append(module.input_logits.grad is not None)
        with torch.no_grad():
            layer(x)  # no step either
        assert layer.get_extra_state().tolist() == [0, step + 1]
    assert learned[layer] == learned[plain] == [True, False] * 3


def test_a_second_derivative_is_refused() -> None:
    layer = FLGConv2d(4, 4, 1, groups=2)
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_repr() -> None:
    layer = FLGConv2d(8, 6, 3, padding=1, groups=2, gradient="winner", update_every=4, bias=False)
    assert repr(layer) == (
        "FLGConv2d(8, 6, kernel_size=(3, 3), padding=1, bias=False, groups=2, gradient='winner', "
        "update_every=4)"
    )
    layer.freeze_structure()
    assert "frozen" in repr(layer)


def test_functions_and_layers_are_one() -> None:
    layer = FLGConv2d(8, 6, 3, groups=2)
    x = torch.randn(1, 8, 5, 5)
    y = gc.flgc_conv2d(x, layer.weight, layer.bias, layer.input_logits, layer.output_logits)
    assert torch.equal(y, layer(x))
