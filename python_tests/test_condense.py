"""CondenseConv2d: the paper's schedule and choice, exact training, conversion, and its state."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from groupconv_ext.nn import CondenseConv2d, PartitionedConv2d, convert

DOUBLE = {"dtype": torch.float64}


def mask(layer: CondenseConv2d) -> torch.Tensor:
    rows = torch.empty(layer.out_channels, layer.in_channels, dtype=torch.float64)
    for group in range(layer.groups):
        rows[group :: layer.groups] = layer.kept[group].double()
    return rows[:, :, None, None]


def test_the_schedule_ends_at_half_the_training() -> None:
    layer = CondenseConv2d(16, 8, 1, groups=4)
    stages = []
    for epoch in range(13):
        layer.condense(epoch / 12)
        stages.append(layer.stage)
        assert layer.partition().entries == 8 * (16 - 4 * layer.stage)
    assert stages == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    late = CondenseConv2d(16, 8, 1, groups=4)
    late.condense(1)
    assert late.stage == 3
    late.condense(0.1)  # what is dropped stays dropped
    assert late.stage == 3


def test_a_stage_is_due_exactly_when_it_is() -> None:
    """2 · (15 / 44) · 22 is 14.999… in floating point, and 15 stages are due."""
    layer = CondenseConv2d(23, 2, 1, groups=1, condense_factor=23)
    for stage in range(23):
        layer.condense(stage / 44)
        assert layer.stage == stage


def test_each_group_drops_its_own_smallest_inputs() -> None:
    layer = CondenseConv2d(12, 8, 3, groups=2, condense_factor=3, **DOUBLE)
    norms = layer.weight.detach().abs().sum((2, 3))
    layer.condense(0.25)
    for group in range(2):
        importance = norms[group::2].sum(0)
        dropped = (~layer.kept[group]).nonzero().flatten()
        assert set(dropped.tolist()) == set(importance.argsort()[:4].tolist())
        assert layer.partition().inputs[group] == tuple(
            layer.kept[group].nonzero().flatten().tolist()
        )
        assert layer.partition().outputs[group] == tuple(range(group, 8, 2))
    before = layer.kept.clone()
    layer.condense(0.5)
    assert not (layer.kept & ~before).any()
    assert layer.kept.sum(1).tolist() == [4, 4]


def test_trains_as_a_masked_dense_layer() -> None:
    """Weights after many steps of SGD with momentum and decay, condensing on the way."""
    layer = CondenseConv2d(12, 8, 3, padding=1, groups=4, **DOUBLE)
    dense = nn.Conv2d(12, 8, 3, padding=1, **DOUBLE)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, target = torch.randn(2, 12, 6, 5, **DOUBLE), torch.randn(2, 8, 6, 5, **DOUBLE)
    ours = torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(dense.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(12):
        layer.condense(step / 12)
        ours.zero_grad()
        theirs.zero_grad()
        loss = functional.mse_loss(layer(x), target) + 1e-3 * layer.group_lasso()
        loss.backward()
        kept = mask(layer)
        y = functional.conv2d(x, dense.weight * kept, dense.bias, padding=1)
        groups = (dense.weight * kept).square().sum((2, 3)).view(2, 4, 12).sum(0)
        lasso = groups[layer.kept].sqrt().sum() if layer.stage < 3 else 0
        (functional.mse_loss(y, target) + 1e-3 * lasso).backward()
        ours.step()
        theirs.step()
        torch.testing.assert_close(layer.weight, dense.weight)
    assert layer.stage == 3


def test_converted_is_a_group_convolution_of_what_is_left() -> None:
    layer = CondenseConv2d(12, 8, 1, stride=2, groups=4, bias=False, **DOUBLE)
    layer.condense(1)
    model = convert(nn.Sequential(nn.BatchNorm2d(12).double(), nn.ReLU(), layer))
    fast = model[2]
    assert isinstance(fast, PartitionedConv2d)
    assert fast.weight.numel() == 12 * 8 // 4
    x = torch.randn(2, 12, 6, 5, **DOUBLE)
    torch.testing.assert_close(fast(x), layer(x))
    # The paper's form: an index layer, a standard group convolution, a shuffle.
    index = torch.tensor([c for inputs in fast.partition.inputs for c in inputs])
    y = functional.conv2d(x[:, index], fast.weight.view(8, 3, 1, 1), None, 2, groups=4)
    torch.testing.assert_close(fast(x), nn.ChannelShuffle(4)(y))


def test_group_lasso_is_zero_and_flat_where_nothing_is_left_to_drop() -> None:
    layer = CondenseConv2d(8, 8, 1, groups=2)
    assert layer.group_lasso() > 0
    layer.condense(1)
    assert layer.group_lasso() == 0
    frozen = CondenseConv2d(8, 8, 1, groups=2)
    frozen.freeze_structure()
    frozen.condense(1)
    assert frozen.stage == 0
    assert frozen.group_lasso() == 0
    zero = CondenseConv2d(8, 8, 1, groups=2)
    nn.init.zeros_(zero.weight)
    zero.group_lasso().backward()
    assert zero.weight.grad is not None
    assert zero.weight.grad.isfinite().all()


def test_state_holds_what_is_kept() -> None:
    layer = CondenseConv2d(8, 8, 1, groups=2, condense_factor=4)
    layer.condense(0.2)
    layer.freeze_structure()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = CondenseConv2d(8, 8, 1, groups=2, condense_factor=4)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.frozen
    assert other.partition() == layer.partition()
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"expected torch.bool with 33 entries"):
        CondenseConv2d(8, 8, 1, groups=4).load_state_dict(layer.state_dict())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="groups = 3 does not divide out_channels = 8"):
        CondenseConv2d(8, 8, 1, groups=3)
    with pytest.raises(ValueError, match="groups = 16 does not divide out_channels = 8"):
        CondenseConv2d(8, 8, 1, groups=16)
    with pytest.raises(ValueError, match="condense_factor = 3 does not divide in_channels = 8"):
        CondenseConv2d(8, 8, 1, groups=2, condense_factor=3)
    layer = CondenseConv2d(8, 8, 1, groups=2)
    for progress in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="progress is"):
            layer.condense(progress)
    nn.init.constant_(layer.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.condense(1)
