"""Backends: they agree, the choice among them is the announced one, and a refusal has a reason."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import GEOMETRIES, PARTITIONS, check_convolution, needs_native, tensors

import groupconv_ext as gc
from groupconv_ext import Partition, _ops, backends, reference
from groupconv_ext.backends import Backend, Call
from groupconv_ext.backends.aten import ATEN
from groupconv_ext.backends.dense import DENSE
from groupconv_ext.backends.native import NATIVE
from groupconv_ext.backends.oracle import REFERENCE
from groupconv_ext.backends.triton import TRITON, availability

ALL = (pytest.param(NATIVE, marks=needs_native, id="native"), ATEN, DENSE, REFERENCE)

# Where nothing is connected only some of them have a gradient, which is zero.
CONNECTED = {name: partition for name, partition in PARTITIONS.items() if partition.entries}

each_backend = pytest.mark.parametrize("backend", ALL, ids=lambda b: b.name)


# ---- they agree ---------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("partition", CONNECTED.values(), ids=CONNECTED.keys())
def test_all_compute_the_same(backend: Backend, dtype: torch.dtype, partition: Partition) -> None:
    for geometry in GEOMETRIES.values():
        x, weight, bias = tensors(partition, geometry, dtype=dtype)
        residual = torch.randn_like(reference.conv2d(x, weight, bias, partition, *geometry.window))
        for activation in ("none", "relu6", "silu"):
            check_convolution(
                partition, geometry, x, weight, bias, residual, activation, backend=backend
            )
        check_convolution(partition, geometry, x[:0], weight, backend=backend)


@each_backend
def test_all_keep_the_memory_format(backend: Backend) -> None:
    for partition in PARTITIONS.values():
        weight = torch.randn(partition.entries, 3, 3)
        x = torch.randn(2, partition.in_channels, 6, 5)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=memory_format)
            y = gc.conv2d(x, weight, partition=partition, backend=backend.name)
            assert y.is_contiguous(memory_format=memory_format), partition


# ---- the choice ---------------------------------------------------------------------------------


def test_names() -> None:
    assert backends.names() == ("native", "triton", "aten", "dense", "reference")


@needs_native
@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cpu", torch.float32, "native"),
        ("cpu", torch.bfloat16, "native"),
        ("cpu", torch.float64, "native"),
        ("meta", torch.float32, "native"),
        ("cpu", torch.float16, "aten"),
        ("cuda", torch.float32, "aten"),
        ("mps", torch.float32, "aten"),
    ],
)
def test_auto(device: str, dtype: torch.dtype, chosen: str) -> None:
    for needs_grad in (False, True):
        assert backends.choose("auto", Call(device, dtype, needs_grad)).name == chosen


def test_a_name_means_that_one() -> None:
    for name in ("aten", "dense", "reference"):
        for device, dtype in (("cpu", torch.float16), ("cuda", torch.float32)):
            assert backends.choose(name, Call(device, dtype, True)).name == name


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend is 'magic'; expected 'auto' or one of .*'aten'"):
        backends.choose("magic", Call("cpu", torch.float32, False))


@needs_native
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            Call("cpu", torch.float16, False),
            r"has no torch\.float16 kernels for the CPU, only float32",
        ),
        (Call("mps", torch.float32, False), "has no kernels for mps devices"),
        (Call("cuda", torch.float8_e4m3fn, False), "float8_e4m3fn kernels|was built without CUDA"),
        (Call("cpu", torch.float32, False, forward_mode=True), "no derivatives in forward mode"),
    ],
)
def test_native_says_why_not(call: Call, reason: str) -> None:
    with pytest.raises(backends.BackendError, match=f"'native' cannot run here: it .*{reason}"):
        backends.choose("native", call)


@needs_native
def test_an_old_gpu_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "has_cuda_kernels", True)
    monkeypatch.setattr(availability, "_HAVE_TRITON", True)
    monkeypatch.setattr(availability, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    call = Call("cuda", torch.float32, True)
    for name in ("native", "triton"):
        with pytest.raises(backends.BackendError, match=r"compute capability 8\.0 .* has 7\.5"):
            backends.choose(name, call)
    assert [backend.name for backend in backends._capable(call)] == ["aten", "dense"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    names = [backend.name for backend in backends._capable(call)]
    assert names == ["native", "triton", "aten", "dense"]


@needs_native
def test_explain() -> None:
    others = dict.fromkeys(name for name in backends.names() if name != "triton")
    reasons = backends.explain("cpu", torch.float32)
    assert reasons.pop("triton") == TRITON.why_not(Call("cpu", torch.float32, False))
    assert reasons == others
    reasons = backends.explain("cpu", torch.float16, needs_grad=True)
    reasons.pop("triton")
    assert "float16" in str(reasons.pop("native"))
    assert set(reasons.values()) == {None}


@needs_native
def test_float16_on_the_cpu() -> None:
    partition, geometry = PARTITIONS["ragged"], GEOMETRIES["3×3"]
    x, weight, bias = (t.half() for t in tensors(partition, geometry))
    y = gc.conv2d(x, weight, bias, partition=partition)
    assert torch.equal(y, gc.conv2d(x, weight, bias, partition=partition, backend="aten"))
    wide = gc.conv2d(x.double(), weight.double(), bias.double(), partition=partition)
    # Rounded as a convolution and with its bias, at magnitudes up to 32.
    torch.testing.assert_close(y.double(), wide, rtol=0, atol=32 * torch.finfo(x.dtype).eps)
    with pytest.raises(backends.BackendError, match=r"'native' cannot run here: it .*float16"):
        gc.conv2d(x, weight, bias, partition=partition, backend="native")


# ---- without the native library -----------------------------------------------------------------

WITHOUT = """
import torch, groupconv_ext as gc
from groupconv_ext import backends
layer = gc.nn.PartitionedConv2d(6, 4, 3, partition=gc.Partition.random(6, 4, 2, seed=0))
x = torch.randn(1, 6, 5, 5)
layer(x).sum().backward()
assert layer.weight.grad.isfinite().all()
layer.backend = "reference"
automatic = gc.conv2d(x, layer.weight, layer.bias, partition=layer.partition)
torch.testing.assert_close(layer(x), automatic)
assert backends.choose("auto", backends.Call("cpu", torch.float32, True)).name == "aten"
try:
    gc.conv2d(x, layer.weight, partition=layer.partition, backend="native")
except backends.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the native library _native.so was not built into this installation"),
        (b"", "the native library could not be loaded: .*file too short"),
        (b"no ELF" * 1000, "the native library could not be loaded: .*invalid ELF header"),
    ],
    ids=["missing", "empty", "foreign"],
)
def test_without_the_native_library(content: bytes | None, reason: str, tmp_path: Path) -> None:
    package = Path(gc.__file__).parent
    shutil.copytree(
        package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pyc*")
    )
    if content is not None:
        (tmp_path / package.name / "_native.so").write_bytes(content)
    search = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.match(f"backend 'native' cannot run here: it .*{reason}", run.stdout), run.stdout
