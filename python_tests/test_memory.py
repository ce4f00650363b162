"""The kernels touch their operands and nothing beside them, and need next to no memory themselves.

Operands end (or begin) exactly where a page begins (or ends) that may not be touched, so a single
element read too far ends the process; which is therefore one of its own.
"""

import ctypes
import itertools
import mmap
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    PARTITIONS,
    Geometry,
    check_convolution,
    forced_isa,
    needs_native,
    run_alone,
    tensors,
)

import groupconv_ext as gc
from groupconv_ext import Partition

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE, which the module mmap does not name
LIBC = ctypes.CDLL(None)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The same tensor, at one end of memory that lies between two pages nobody may touch."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order).contiguous()
    size = dense.numel() * dense.element_size()
    if size == 0:
        return tensor
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + PAGE + inner):
        assert LIBC.mprotect(ctypes.c_void_p(guard), PAGE, NO_ACCESS) == 0
    offset = PAGE + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=dense.numel(), offset=offset)
    copy = copy.view(dense.shape).copy_(dense)
    return copy.permute([order.index(d) for d in range(tensor.dim())])


def check_between_guards() -> None:
    kinds = ("ragged", "overlapping, unread", "depthwise", "group without inputs")
    cases = [*itertools.product((PARTITIONS[kind] for kind in kinds), GEOMETRIES.values())]
    cases += [
        (Partition.random(40, 33, 1, seed=0), Geometry((7, 7))),
        (Partition.random(36, 72, 2, seed=0), Geometry((5, 13), (3, 3), padding=(1, 1, 1, 1))),
        (Partition.random(48, 48, 48, seed=0), Geometry((9, 7), (3, 3), (2, 2), (1, 1, 1, 1))),
        (Partition.random(19, 21, 4, seed=0, uneven=True), Geometry((1, 67))),
    ]
    layouts = (LAYOUTS["NCHW"], LAYOUTS["channels_last"])
    for (partition, geometry), dtype, layout, at_end in itertools.product(
        cases, DTYPES, layouts, (False, True)
    ):
        x, weight, bias = tensors(partition, geometry, dtype=dtype)
        x, weight, bias = (guarded(t, at_end) for t in (layout(x), weight, bias))
        for isa in ISAS:
            with forced_isa(isa):
                check_convolution(
                    partition,
                    geometry,
                    x,
                    weight,
                    bias,
                    grad_layout=lambda t, layout=layout, end=at_end: guarded(layout(t), end),
                )


def check_peak() -> None:
    """Far from the 30 MB that gathering every window would take, in each of the three passes."""
    partition = Partition.random(64, 64, 4, seed=0)
    x = torch.randn(1, 64, 112, 112, requires_grad=True)
    weight = torch.randn(partition.entries, 3, 3, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=partition, padding=1, backend="native")

    small = call(x[:, :, :9, :9])
    torch.autograd.grad(small, (x, weight), torch.ones_like(small))
    grad = torch.ones(1, 64, 112, 112)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(call(x), (x, weight), grad)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results = 2 * x.numel() * 4 / 2**20
    assert grown < results + 4 * torch.get_num_threads(), (
        f"{grown:.1f} MiB, {results:.1f} of results"
    )


def check_far_taps() -> None:
    """Taps far apart stage what they read, not the 14 MiB of pixels between them."""
    partition = Partition.random(64, 64, 4, seed=0)
    x = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(partition.entries, 3, 3, requires_grad=True)

    def call(apart: int) -> None:
        size = {"padding": apart, "dilation": apart}
        y = gc.conv2d(x, weight, partition=partition, backend="native", **size)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    call(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(36)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 4, f"{grown:.1f} MiB"


def check_many_outputs() -> None:
    """A dense weight gradient in channels_last: its gradient is put in order a part at a time."""
    torch.set_num_threads(1)
    grown = 0.0
    for outputs in (64, 2**16):
        partition = Partition.contiguous(64, outputs, 1)
        weight = torch.randn(partition.entries, 1, 1, requires_grad=True)
        x = torch.randn(1, 64, 7, 7).contiguous(memory_format=torch.channels_last)
        y = gc.conv2d(x, weight, partition=partition, backend="native")
        grad = torch.ones_like(y)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        torch.autograd.grad(y, weight, grad)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result = weight.numel() * 4 / 2**20
    assert grown < result + 2, f"{grown:.1f} MiB, {result:.1f} of the result"


def check_large_weights() -> None:
    """Nobody makes a second copy of 9 MiB of weights for a few pixels of channels_last."""
    grown = 0.0
    for channels in (64, 512):
        partition = Partition.contiguous(channels, channels, 1)
        weight = torch.randn(partition.entries, 3, 3)
        x = torch.randn(1, channels, 7, 7).contiguous(memory_format=torch.channels_last)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gc.conv2d(x, weight, partition=partition, padding=1, backend="native")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 2 + torch.get_num_threads(), f"{grown:.1f} MiB"


def check_exhausted() -> None:
    """A thread without memory says how much it wanted, and the threads stay as they were."""
    torch.set_num_threads(2)
    channels = 2**20
    partition = Partition(channels, 1, [[0]], [[0]])
    x = torch.ones(1, 1, 1, channels).expand(4, 40, 40, channels).movedim(-1, 1)
    weight = torch.ones(1, 16, 16)
    denormals = torch.full((2**21,), 1e-40)

    def flushed() -> int:
        return int((denormals * 1.0 == 0).sum())

    assert flushed() == 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(RuntimeError, match=r"no memory for [1-9]\d{9,} bytes of scratch"):
            gc.conv2d(x, weight, partition=partition, backend="native")
    finally:
        torch.set_flush_denormal(False)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert flushed() == 0


def huge_kilobytes(address: int) -> int:
    """Of the mapping that holds the address."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            within = first <= address < last
        elif within and head == "AnonHugePages:":
            return int(rest[0])
    raise LookupError(f"no mapping holds {address:#x}")


def check_huge_pages() -> None:
    """In a new process: elsewhere a tensor may lie in memory that another one has left."""
    partition = Partition.random(64, 64, 4, seed=0)
    weight = torch.randn(partition.entries, 1, 1)
    y = gc.conv2d(torch.randn(8, 64, 128, 128), weight, partition=partition)  # 32 MiB
    middle = y.data_ptr() + y.numel() * y.element_size() // 2
    assert huge_kilobytes(middle) >= 16 << 10


CHECKS: dict[str, Callable[[], None]] = {
    "guards": check_between_guards,
    "peak": check_peak,
    "far taps": check_far_taps,
    "many outputs": check_many_outputs,
    "large weights": check_large_weights,
    "exhausted": check_exhausted,
    "huge pages": check_huge_pages,
}


@needs_native
@pytest.mark.parametrize("check", CHECKS)
def test_memory(check: str) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if check == "huge pages" and (not setting.exists() or "[never]" in setting.read_text()):
        pytest.skip("this system has no transparent huge pages")
    run_alone(__file__, check)


if __name__ == "__main__":
    torch.manual_seed(0)
    CHECKS[sys.argv[1]]()
