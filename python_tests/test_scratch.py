"""What a pass takes beside its results: 1 MiB a thread, twice that where kernels call kernels, and
a copy of the weight, or of its gradient for each thread.

A copy has whole vectors of channels, and lists of them beside it. Of bfloat16 there is also what is
computed in: the weight in float32, or the gradient before it is rounded. Counted in a process whose
allocations, those of kernels and those of tensors, are seen by scratch_seen.cpp.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ISAS, LAYOUTS, forced_isa, needs_native, run_alone

import groupconv_ext as gc
from groupconv_ext import Partition, Prologue, _ops

COMPILER = os.environ.get("CXX") or shutil.which("g++")
SOURCE = Path(__file__).with_name("scratch_seen.cpp")
MIB = 2**20
LISTS = 32
"""Bytes for each channel."""

LAYERS = [  # window, channels, side, groups, images, stride
    (1, 256, 56, 4, 1, 1),
    (1, 256, 56, 32, 1, 1),
    (1, 1024, 14, 8, 4, 1),
    (1, 2048, 7, 32, 2, 1),
    (1, 512, 28, 8, 1, 2),
    (3, 128, 56, 32, 1, 1),
    (3, 256, 28, 8, 1, 1),
    (3, 1024, 7, 32, 2, 1),
    (3, 512, 14, 4, 1, 2),
    (3, 64, 112, 1, 1, 1),
    (3, 256, 28, 256, 2, 1),
    (5, 240, 14, 240, 2, 2),
    (1, 1024, 7, 2, 12, 1),
    (3, 384, 14, 1, 6, 1),
    (3, 384, 14, 3, 6, 1),
]
"""Large ones of every driver; the gradient of the last is much more than a MiB."""

RAGGED = [(1, 900, 14, 5, 4, 1), (3, 390, 14, 3, 4, 1), (3, 150, 28, 20, 2, 1)]
"""Groups of different sizes."""

IN_ONE_PASS = [(1, 256, 56, 8, 4, 1), (1, 64, 56, 4, 16, 1)]
"""Whose gradient under a clamp is never stored whole."""

Results = torch.Tensor | tuple[torch.Tensor, ...]


def passes(
    layer: tuple[int, ...], dtype: torch.dtype, layout: str, prepared: bool, isa: str
) -> Iterator[tuple[str, int, Callable[[], Results]]]:
    """Each pass by its name, with the bytes of a weight's copy."""
    window, channels, side, groups, images, stride = layer
    partition = Partition.random(channels, channels, groups, seed=0, uneven=layer in RAGGED)
    x = LAYOUTS[layout](torch.randn(images, channels, side, side, dtype=dtype))
    weight = torch.randn(partition.entries, window, window, dtype=dtype)
    prologue = Prologue(torch.randn(channels, dtype=dtype), None, "relu") if prepared else None
    around = window // 2
    call = {"stride": stride, "padding": around, "backend": "native"}

    def forward() -> torch.Tensor:
        return gc.conv2d(x, weight, partition=partition, prologue=prologue, **call)

    grad = torch.randn_like(forward())
    blocks = sum(-(-outs // 16) * -(-ins // 16) for outs, ins in partition.sizes)
    copy = 4 * 16**2 * blocks * window**2
    if isa != "avx512_amx":  # whose registers are blocks, however small a group is
        copy = min(copy, weight.numel() * 5)
    yield "forward", copy, forward
    geometry = (stride, stride, *(around,) * 4, 1, 1)
    table, last = partition.cpu_table, layout == "channels_last"
    if prologue is not None:
        before = (prologue.scale, None, True)
        sizes = (partition.entries, window, window, *geometry)
        yield (
            "input gradient",
            copy,
            lambda: _ops.prologue_conv2d_input_grad(grad, weight, x, *before, table, *geometry),
        )
        yield (
            "weight gradient",
            copy,
            lambda: _ops.prologue_conv2d_weight_grad(grad, x, *before, table, *sizes),
        )
        return
    sizes = (channels, side, side, *geometry)
    yield (
        "input gradient",
        copy,
        lambda: _ops.conv2d_input_grad(grad, weight, table, *sizes, last),
    )
    clamped, activation = (forward().relu(), 1) if layer in IN_ONE_PASS else (None, 0)
    all_three = (x, weight, table, *geometry, activation, True, True, True)
    sizes = (partition.entries, window, window, *geometry)
    yield "weight gradient", copy, lambda: _ops.conv2d_weight_grad(grad, x, table, *sizes)
    yield "backward", copy, lambda: _ops.conv2d_backward(grad, clamped, *all_three)


def check(threads: int) -> None:
    process = ctypes.CDLL(None)
    process.scratch_peak.restype = ctypes.c_size_t
    torch.set_num_threads(threads)
    seen = 0  # the most
    for layer, dtype, layout, prepared in itertools.product(
        LAYERS + RAGGED + IN_ONE_PASS,
        (torch.float32, torch.bfloat16),
        ("NCHW", "channels_last"),
        (False, True),
    ):
        if layer in IN_ONE_PASS and dtype == torch.bfloat16:
            continue
        for isa in ISAS:
            if isa == "scalar" or (isa == "avx512_bf16" and dtype == torch.float32):
                continue
            with forced_isa(isa):
                for name, copy, call in passes(layer, dtype, layout, prepared, isa):
                    process.scratch_forget()
                    results = call()
                    made = (results,) if isinstance(results, torch.Tensor) else results
                    kept = sum(result.untyped_storage().nbytes() for result in made)
                    scratch = process.scratch_peak() - kept
                    seen = max(seen, scratch)
                    copies = (1 if name == "forward" else threads) + (dtype == torch.bfloat16)
                    # Where kernels call kernels, both keep for the next call what they have.
                    deep = 2 if layer in IN_ONE_PASS else 1
                    most = threads * deep * MIB + copies * copy + LISTS * layer[1]
                    assert scratch <= most, (
                        f"{name} of {layer}, {dtype}, {layout}, {isa}, prologue {prepared}: "
                        f"{scratch / MIB:.2f} MiB, a copy has {copy / MIB:.2f}"
                    )
    assert seen > 0, "nothing was counted"


@needs_native
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_scratch(threads: int, tmp_path: Path) -> None:
    library = tmp_path / "scratch_seen.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC"]
    subprocess.run([str(COMPILER), *flags, SOURCE, "-o", library, "-ldl"], check=True)
    run_alone(__file__, str(threads), LD_PRELOAD=str(library))


if __name__ == "__main__":
    torch.manual_seed(0)
    check(int(sys.argv[1]))
