"""PyTorch's broken narrow convolutions stay out of here.

On a CPU with AMX, PyTorch 2.13 dies in dilated convolutions of float16 and bfloat16 whose maps are
a few pixels wide, and computes strided ones of bfloat16 from memory that is not theirs. A crash
would take the other tests along, so this runs in a process of its own.
"""

import sys
from itertools import product

import pytest
import torch
from helpers import run_alone

import groupconv_ext as gc

# (height, width), kernel, stride, padding, dilation: most crash or are wrong in F.conv2d itself.
WINDOWS = [
    ((19, 1), (3, 1), (3, 3), (0, 2), (2, 2)),
    ((19, 1), (5, 2), (3, 2), (2, 3), (3, 2)),
    ((3, 2), (3, 1), (3, 3), (1, 1), (1, 3)),
    ((8, 1), (3, 2), (2, 2), (2, 3), (2, 2)),
    ((19, 2), (2, 2), (2, 3), (0, 1), (1, 1)),
    ((8, 8), (3, 5), (1, 2), (1, 1), (1, 1)),
    ((19, 3), (3, 3), (3, 3), (0, 1), (1, 1)),
    ((5, 3), (5, 2), (1, 2), (2, 0), (1, 1)),
]


def check(backend: str, dtype: torch.dtype) -> None:
    p = gc.Partition.from_labels([0, 1, 0, 2, 1, 0, 2, 2], [2, 0, 0, 1, 2, 1], 3)
    for ((h, w), kernel, stride, padding, dilation), autocast in product(WINDOWS, (False, True)):
        given = torch.float32 if autocast else dtype
        x = torch.randn(3, 8, h, w).to(dtype).to(given).requires_grad_()
        weight = torch.randn(p.entries, *kernel).to(dtype).to(given).requires_grad_()
        window = {"stride": stride, "padding": padding, "dilation": dilation}
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = gc.conv2d(x, weight, partition=p, **window, backend=backend)
        assert y.dtype == dtype
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = torch.nn.functional.conv2d(wide[0], p.unpack(wide[1]), None, **window)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, weight), grad)
        wanted = torch.autograd.grad(expected, wide, grad.double())
        for actual, exact in zip((y, *found), (expected, *wanted), strict=True):
            torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_strided_and_dilated_windows(dtype: str) -> None:
    assert run_alone(__file__, dtype) == "sound\n"


if __name__ == "__main__":
    for name in ("auto", "aten", "dense", "reference"):
        check(name, getattr(torch, sys.argv[1]))
    print("sound")
