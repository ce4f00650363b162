"""PyTorch's heap corruption stays out of here.

On the CPU, PyTorch's weight gradient of a strided 1×1 convolution writes past its memory where the
input is channels_last and its channels are no multiple of a vector (seen in 2.13 and 2.15). A heap
that is broken may break anything, much later; so this runs in a process of its own, whose allocator
checks itself, and which has to end in good health.
"""

import sys

import pytest
import torch
from helpers import needs_native, run_alone

import groupconv_ext as gc

SHAPES = [(3, 14, 12, 22), (1, 33, 8, 7)]
STRIDES = [(2, 1), (2, 2)]
OUT_CHANNELS = 10


def check(backend: str) -> None:
    for shape in SHAPES:
        dense = gc.Partition.contiguous(shape[1], OUT_CHANNELS, 1)
        for down, right in STRIDES:
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
            weight = torch.randn(dense.entries, 1, 1, requires_grad=True)
            y = gc.conv2d(x, weight, partition=dense, stride=(down, right), backend=backend)
            for memory_format in (torch.channels_last, torch.contiguous_format):
                grad = torch.randn_like(y).contiguous(memory_format=memory_format)
                x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
                read = x.detach()[:, :, ::down, ::right]
                expected = torch.einsum("bnhw,bchw->nc", grad, read).reshape(weight.shape)
                torch.testing.assert_close(weight_grad, expected, rtol=1e-4, atol=1e-4)
                spread = torch.einsum("bnhw,nc->bchw", grad, weight.detach().view(OUT_CHANNELS, -1))
                torch.testing.assert_close(x_grad[:, :, ::down, ::right], spread)


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=needs_native), "aten", "dense", "reference"]
)
def test_strided_pointwise_weight_gradient_in_channels_last(backend: str) -> None:
    # glibc's own checks: abort on damage (3), and fill what is freed so that a late reader sees it.
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    found = run_alone(__file__, backend, LD_PRELOAD="libc_malloc_debug.so.0", **checks)
    assert found == "healthy\n"


if __name__ == "__main__":
    for _ in range(50):
        check(sys.argv[1])
    print("healthy")
