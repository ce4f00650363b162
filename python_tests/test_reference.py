"""The oracle itself, against PyTorch's dense convolution with a masked weight, in float64."""

from typing import Any

import pytest
import torch
from helpers import (
    GEOMETRIES,
    PARTITIONS,
    Geometry,
    dense_reference,
    geometries,
    partitions,
    tensors,
)
from hypothesis import given

from groupconv_ext import reference
from groupconv_ext.partition import Partition

each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums of at most a few hundred products of standard normals, rounded to 2⁻⁵³ each.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def check_all(partition: Partition, geometry: Geometry) -> None:
    """Forward and both gradients."""
    x, weight, bias = tensors(partition, geometry)
    x.requires_grad_()
    weight.requires_grad_()
    expected = dense_reference(x, weight, partition, geometry, bias)
    assert_equal(reference.conv2d(x, weight, bias, partition, *geometry.window), expected)

    grad = torch.randn_like(expected)
    x_grad, weight_grad = torch.autograd.grad(expected, (x, weight), grad)
    actual = reference.conv2d_input_grad(
        grad, weight, partition, geometry.input_size, *geometry.window
    )
    assert_equal(actual, x_grad)
    actual = reference.conv2d_weight_grad(
        grad, x, partition, geometry.kernel_size, *geometry.window
    )
    assert_equal(actual, weight_grad)


@each_geometry
@each_partition
def test_equals_the_masked_dense_convolution(partition: Partition, geometry: Geometry) -> None:
    check_all(partition, geometry)


@given(partitions(), geometries())
def test_equals_the_masked_dense_convolution_anywhere(
    partition: Partition, geometry: Geometry
) -> None:
    check_all(partition, geometry)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", [None, *reference.activations])
def test_epilogue(activation: str | None, with_bias: bool, with_residual: bool) -> None:
    partition, geometry = PARTITIONS["overlapping, unread"], GEOMETRIES["strided"]
    x, weight, some_bias = tensors(partition, geometry)
    plain = dense_reference(x, weight, partition, geometry)
    bias = some_bias if with_bias else None
    residual = 3 * torch.randn_like(plain) if with_residual else None
    expected = dense_reference(x, weight, partition, geometry, bias, activation, residual)
    actual = reference.conv2d(x, weight, bias, partition, *geometry.window, activation, residual)
    assert_equal(actual, expected)


def test_activation_codes_are_pinned() -> None:
    # The native operations take the position as a number.
    assert list(reference.activations) == ["none", "relu", "relu6", "silu", "hardswish"]


@each_partition
def test_differentiable_twice(partition: Partition) -> None:
    geometry = Geometry((3, 4), (2, 2), stride=(1, 2), padding=(1, 0, 0, 1))
    x, weight, bias = (t.requires_grad_() for t in tensors(partition, geometry, batch=1))
    grad = torch.randn_like(reference.conv2d(x, weight, None, partition, *geometry.window))
    grad = grad.detach().requires_grad_()

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference.conv2d(x, weight, bias, partition, *geometry.window, "silu")

    def input_grad(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        size = geometry.input_size
        return reference.conv2d_input_grad(grad, weight, partition, size, *geometry.window)

    def weight_grad(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernel = geometry.kernel_size
        return reference.conv2d_weight_grad(grad, x, partition, kernel, *geometry.window)

    assert torch.autograd.gradcheck(forward, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(input_grad, (grad, weight), fast_mode=True)
    assert torch.autograd.gradcheck(weight_grad, (grad, x), fast_mode=True)


@each_partition
def test_empty_batch(partition: Partition) -> None:
    geometry = GEOMETRIES["3×3"]
    x, weight, bias = tensors(partition, geometry, batch=0)
    y = reference.conv2d(x, weight, bias, partition, *geometry.window)
    assert y.shape == (0, partition.out_channels, *geometry.input_size)
    size, kernel = geometry.input_size, geometry.kernel_size
    x_grad = reference.conv2d_input_grad(y, weight, partition, size, *geometry.window)
    assert x_grad.shape == x.shape
    weight_grad = reference.conv2d_weight_grad(y, x, partition, kernel, *geometry.window)
    assert_equal(weight_grad, torch.zeros_like(weight))


def test_image_without_pixels() -> None:
    partition = PARTITIONS["ragged"]
    geometry = Geometry((0, 3), (2, 1), padding=(1, 1, 0, 0))
    x, weight, bias = tensors(partition, geometry)
    y = reference.conv2d(x, weight, bias, partition, *geometry.window)
    assert_equal(y, bias[:, None, None].expand(2, -1, 1, 3))


def test_only_what_is_read_matters() -> None:
    partition = PARTITIONS["overlapping, unread"]
    geometry = GEOMETRIES["3×3"]
    x, weight, bias = tensors(partition, geometry)
    expected = reference.conv2d(x, weight, bias, partition, *geometry.window)
    x[:, [2, 3]] = torch.nan  # read by nobody
    assert_equal(reference.conv2d(x, weight, bias, partition, *geometry.window), expected)
    x[:, 4] = torch.nan  # read by the second group
    y = reference.conv2d(x, weight, bias, partition, *geometry.window)
    assert y.isnan().flatten(2).all(2).tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_does_not_matter(memory_format: torch.memory_format) -> None:
    # The shape on which PyTorch's own weight gradient corrupts memory in channels_last.
    partition, geometry = Partition.contiguous(14, 10, 1), Geometry((12, 22), stride=(2, 1))
    x, weight, _ = tensors(partition, geometry, batch=3)
    y = dense_reference(x, weight, partition, geometry)
    expected = torch.einsum("bnhw,bchw->nc", y, x[:, :, ::2]).reshape(-1, 1, 1)
    x, grad = (t.contiguous(memory_format=memory_format) for t in (x, y))
    assert_equal(reference.conv2d(x, weight, None, partition, *geometry.window), y)
    actual = reference.conv2d_weight_grad(grad, x, partition, (1, 1), *geometry.window)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    partition, geometry = PARTITIONS["ragged"], GEOMETRIES["3×3"]
    x, weight, bias = (t.to(dtype) for t in tensors(partition, geometry))
    actual = reference.conv2d(x, weight, bias, partition, *geometry.window, "relu")
    assert actual.dtype == dtype
    wide = dense_reference(x.double(), weight.double(), partition, geometry, bias.double(), "relu")
    # 45 products and a bias: the sum, then the bias, is rounded to dtype, at magnitudes up to 32.
    torch.testing.assert_close(actual.double(), wide, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 4, 5, 5)}, "x has 4 channels; expected 6"),
        ({"weight": torch.ones(11, 3, 3)}, "weight has 11 entries; expected 12"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected None or one of .*'silu'"),
        ({"x": torch.ones(1, 6, 2, 5)}, "the kernel spans 3×3 pixels but .* only 2×5"),
        ({"dilation": (1, 3)}, "the kernel spans 3×7 pixels but .* only 5×5"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    partition = PARTITIONS["overlapping, unread"]
    arguments: dict[str, Any] = {
        "x": torch.ones(1, 6, 5, 5),
        "weight": torch.ones(12, 3, 3),
        "bias": None,
    }
    reference.conv2d(**arguments, partition=partition)
    with pytest.raises(ValueError, match=message):
        reference.conv2d(**{**arguments, **change}, partition=partition)


def test_fresh_memory_is_poisoned() -> None:
    # What all tests count on: nothing that was never written can equal an expected value.
    assert torch.empty(100).isnan().all()
    assert torch.empty_like(torch.zeros(3, 3), dtype=torch.bfloat16).isnan().all()
    assert torch.zeros(2).new_empty(7).isnan().all()
