"""DGConv layers: exact sparse training, gates, their history and the resource constraint."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import groupconv_ext as gc
from groupconv_ext import reference
from groupconv_ext.nn import DGConv2d, ResourceConstraint
from groupconv_ext.partition import Partition


@pytest.mark.parametrize(("ins", "outs"), [(8, 8), (12, 24), (18, 12)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_training_is_that_of_the_masked_dense_layer(
    ins: int, outs: int, kernel: int, stride: int
) -> None:
    layer = DGConv2d(ins, outs, kernel, stride, kernel // 2, dtype=torch.float64)
    with torch.no_grad():
        layer.gates.uniform_(-0.002, 0.002)
    weight, gates, bias = (
        nn.Parameter(p.detach().clone()) for p in (layer.weight, layer.gates, layer.bias)
    )
    target = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, dtype=torch.float64)
    optimizers = [
        torch.optim.SGD(parameters, lr=0.3, momentum=0.5)
        for parameters in (list(layer.parameters()), [weight, gates, bias])
    ]
    seen = {layer.partition()}
    for _ in range(50):
        x = torch.randn(4, ins, 6, 6, dtype=torch.float64)
        goal = target(x).detach()
        naive = functional.conv2d(
            x, reference.dgconv_weight(weight, gates), bias, stride, kernel // 2
        )
        losses = []
        for y, optimizer in zip((layer(x), naive), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (y - goal).square().mean() * 4
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
        for own, other in ((layer.weight, weight), (layer.gates, gates), (layer.bias, bias)):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)
        seen.add(layer.partition())
    assert len(seen) > 1, "no gate ever moved: the test shows nothing"


@pytest.mark.parametrize("gates", [[0, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
def test_it_is_the_convolution_of_its_gates(gates: list[int]) -> None:
    layer = DGConv2d(12, 24, 3, padding=1, gates=gates)
    assert layer.radices == (2, 2, 3)
    partition = layer.partition()
    assert partition == Partition.kronecker(gates, 12, 24)
    x = torch.randn(2, 12, 5, 5)
    mask = partition.mask()[:, :, None, None]
    expected = functional.conv2d(x, layer.weight * mask, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.deployed()(x), expected)


def test_gates_start_at_random_around_zero() -> None:
    layers = [DGConv2d(64, 64, 1) for _ in range(20)]
    values = torch.cat([layer.gates.detach() for layer in layers])
    torch.testing.assert_close(values.abs(), torch.full_like(values, 1e-8))
    assert 30 < (values > 0).sum() < 90


def test_channels_without_a_common_factor_are_dense() -> None:
    layer = DGConv2d(5, 8, 1)
    assert layer.gates.shape == (0,)
    x = torch.randn(1, 5, 3, 3)
    torch.testing.assert_close(layer(x), functional.conv2d(x, layer.weight, layer.bias))
    layer(x).sum().backward()


@pytest.mark.parametrize("wrong", [[1, 0], [1, 0, 2], [0, 0, 0, 0]])
def test_gates_that_do_not_fit(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="gates"):
        DGConv2d(8, 8, 1, gates=wrong)


def test_a_diverged_gate_names_the_layer() -> None:
    layer = DGConv2d(8, 8, 1)
    with torch.no_grad():
        layer.gates[1] = torch.inf
    with pytest.raises(ValueError, match=r"DGConv2d\(8, 8\)\.gates has inf at \[1\]"):
        layer.eval()(torch.randn(1, 8, 2, 2))
    with pytest.raises(ValueError, match=r"DGConv2d\(8, 8\)\.gates has inf"):
        layer.deployed()


def test_the_history_of_the_gates() -> None:
    layer = DGConv2d(4, 4, 1, gates=[1, 0])
    x = torch.randn(1, 4, 2, 2)
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                layer.gates.neg_()
        layer(x)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert layer.gate_history == [(0, (1, 0)), (3, (0, 1))]


def test_a_checkpoint_goes_on_with_the_history() -> None:
    layer, other = DGConv2d(4, 4, 1, gates=[1, 0]), DGConv2d(4, 4, 1)
    x = torch.randn(1, 4, 2, 2)
    layer(x)
    layer(x)
    other(x)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    with torch.no_grad():
        other.gates.neg_()
    other(x)
    assert other.gate_history == [(0, (1, 0)), (2, (0, 1))]
    no_gates = DGConv2d(3, 4, 1)
    no_gates(torch.randn(1, 3, 2, 2))
    DGConv2d(3, 4, 1).load_state_dict(no_gates.state_dict())
    state = layer.state_dict()
    state["_extra_state"] = state["_extra_state"][:-1]
    with pytest.raises(ValueError, match="history has 2 numbers; expected 3 for every change"):
        other.load_state_dict(state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_count_a_step_twice(reentrant: bool) -> None:
    layer = DGConv2d(4, 4, 1, gates=[0, 1])
    for step in range(3):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        with torch.no_grad():
            layer.gates[0] = 1.0 if step % 2 == 0 else -1.0
    assert layer.gate_history == [(0, (0, 1)), (1, (1, 1)), (2, (0, 1))]


def test_freezing_and_state() -> None:
    layer, other = DGConv2d(8, 8, 3, gates=[0, 1, 0]), DGConv2d(8, 8, 3, gates=[1, 1, 1])
    x = torch.randn(2, 8, 5, 5)
    y = layer(x)
    y.sum().backward()
    layer.freeze_structure()
    torch.testing.assert_close(layer(x), y)
    assert layer.gates.grad is None
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.gates.grad is None
    assert not layer.weight.grad[~layer.partition().mask()].any()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.frozen
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast(kernel: int) -> None:
    layer = DGConv2d(32, 32, kernel, gates=[0, 0, 1, 1, 0])
    x = torch.randn(2, 32, 7, 7, requires_grad=True)
    wanted = [x, *layer.parameters()]
    exact = layer(x)
    grads = torch.autograd.grad(exact.square().sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    found = torch.autograd.grad(y.float().square().sum(), wanted)
    for grad, expected in zip(found, grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected, rtol=0.1, atol=0.03 * expected.abs().max())


def test_meta_and_channels_last() -> None:
    layer = DGConv2d(8, 12, 3, padding=1, device="meta")
    assert layer(torch.empty(2, 8, 6, 6, device="meta")).shape == (2, 12, 6, 6)
    layer = DGConv2d(8, 12, 3, padding=1)
    x = torch.randn(2, 8, 6, 6)
    y = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.slow
def test_compile_as_one_graph() -> None:
    layer = DGConv2d(8, 8, 3, padding=1)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 8, 6, 6)
    for gates in ([1.0, -1.0, 1.0], [-1.0, -1.0, 0.0]):
        with torch.no_grad():
            layer.gates.copy_(torch.tensor(gates))
        y, eager = compiled(x), layer(x)
        torch.testing.assert_close(y, eager)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for grad, expected in zip(
            grads, torch.autograd.grad(eager.square().sum(), list(layer.parameters())), strict=True
        ):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


# ---- the resource constraint --------------------------------------------------------------------


def test_connections() -> None:
    for channels in ((12, 24), (24, 12), (60, 36)):
        for gates in ([0, 0, 0], [1, 0, 1], [1, 1, 1]):
            layer = DGConv2d(*channels, 1, gates=gates)
            assert layer.connections().item() == layer.partition().entries
    layer = DGConv2d(12, 24, 1, gates=[1, 0, 1])
    (grad,) = torch.autograd.grad(layer.connections(), layer.gates)
    # ζ = 24 · Π (1 + (p − 1) g): its derivative by one gate, the others as they are.
    assert grad.tolist() == [24 * 3, 24 * 2 * 3, 24 * 2 * 2]


def test_the_budget_of_the_papers_networks() -> None:
    # ΣC² of the grouped 3×3 layers of ResNeXt-50 and 101, 32×4d.
    for blocks, expected in (((3, 4, 6, 3), 157_184), ((3, 4, 23, 3), 296_448)):
        widths = [128 * 2**stage for stage, count in enumerate(blocks) for _ in range(count)]
        model = nn.ModuleList(DGConv2d(width, width, 1, device="meta") for width in widths)
        assert ResourceConstraint(model, b=32).budget == expected


def test_the_constraint() -> None:
    model = nn.Sequential(DGConv2d(8, 8, 1, gates=[1, 1, 1]), nn.ReLU(), DGConv2d(8, 8, 1))
    loss = torch.tensor(3.0, requires_grad=True)
    constraint = ResourceConstraint(model, b=4)
    assert constraint.budget == 32
    used = sum(layer.partition().entries for layer in model[::2])
    torch.testing.assert_close(constraint(loss), loss * (32 / used) ** -0.02)
    constraint(loss).backward()
    assert (model[0].gates.grad > 0).all()  # a smaller gate, a smaller loss
    frugal = nn.Sequential(DGConv2d(8, 8, 1, gates=[0, 0, 0]))
    within = ResourceConstraint(frugal, b=4)(loss)
    assert within.item() == 3
    within.backward()
    assert frugal[0].gates.grad is None or not frugal[0].gates.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"b": 0}, "b is 0"), ({"exponent": 1}, "exponent")]
)
def test_a_constraint_that_makes_no_sense(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResourceConstraint(DGConv2d(4, 4, 1), **arguments)
    with pytest.raises(ValueError, match="no DGConv2d"):
        ResourceConstraint(nn.Linear(2, 2))


def test_functions_and_layers_are_one() -> None:
    layer = DGConv2d(8, 8, 3)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(gc.dgconv_conv2d(x, layer.weight, layer.bias, layer.gates), layer(x))
