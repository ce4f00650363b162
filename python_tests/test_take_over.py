"""PyTorch's layers on this library's kernels: the same functions, and what is left alone."""

import pytest
import torch
from torch import nn

from groupconv_ext.nn import Linear, PartitionedConv1d, PartitionedConv2d, fold, take_over


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(12, 8, 3, padding="same", groups=4, bias=False),
        nn.Conv2d(12, 12, 3, dilation=2, groups=12, padding=2, padding_mode="reflect"),
        nn.Conv2d(5, 7, (1, 3)),
    ],
)
def test_convolutions(conv: nn.Conv2d) -> None:
    layer = take_over(conv)
    assert type(layer) is PartitionedConv2d
    x = torch.randn(2, conv.in_channels, 9, 10)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_sound() -> None:
    conv = nn.Conv1d(6, 4, 5, padding=2, groups=2)
    layer = take_over(conv)
    assert type(layer) is PartitionedConv1d
    x = torch.randn(2, 6, 30)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (7, 20), (2, 0, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layers(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(20, 33, bias, dtype=dtype)
    layer = take_over(linear)
    assert type(layer) is Linear
    assert layer.weight is linear.weight
    assert layer.state_dict().keys() == linear.state_dict().keys()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y, expected = layer(x), linear(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(y)
    of = (x, *linear.parameters())
    found = torch.autograd.grad(y, of, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, of, grad), rtol=1e-4, atol=1e-5)


def test_rows_apart() -> None:
    layer = Linear(20, 33)
    x = torch.randn(20, 9).t()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


class Own(nn.Linear):
    """Somebody's own layer."""


def test_only_pytorchs_own_layers_and_each_once() -> None:
    shared = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), Own(72, 4)).eval()
    x = torch.randn(2, 8, 3, 3)
    expected = model(x)
    assert take_over(model) is model
    assert model[0] is model[2]
    assert type(model[0]) is PartitionedConv2d
    assert not model[0].training
    assert type(model[4]) is Own
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert take_over(model).state_dict().keys() == state.keys()


def test_then_activations_fold_into_dense_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fold(take_over(model))
    assert [type(layer) for layer in model] == [PartitionedConv2d]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_exported() -> None:
    model = take_over(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))).eval()
    x = torch.randn(2, 3, 6, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for size in (2, 3):
        x = torch.randn(size, 3, 6, 6)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        take_over(torch.relu)
