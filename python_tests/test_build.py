"""What was built: the promises of the installed library that no other test would notice broken.

The tests of object files and compiler reports need the build folder and are skipped without it.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import groupconv_ext
from groupconv_ext import _ops, reference

ROOT = Path(__file__).parents[1]
BUILD = ROOT / os.environ.get("GROUPCONV_BUILD_DIR", "build/cmake")
OBJECTS = BUILD / "CMakeFiles"

pytestmark = pytest.mark.skipif(not _ops.LIBRARY.exists(), reason="no native library installed")


def output_of(tool: str | Path, *arguments: str | Path) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def in_new_process(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def objects(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in OBJECTS.glob(f"*.dir/{pattern}.o"))
    if not found:
        pytest.skip(f"no object files in {BUILD}")
    return found


def introspection() -> Any:
    return pytest.importorskip("groupconv_ext._introspect")


# ---- The library file ----------------------------------------------------------------------------


def test_needs_no_library_that_a_torch_may_lack() -> None:
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", _ops.LIBRARY)))
    assert "libtorch_cpu.so" in needed
    system = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|asan|ubsan)\.so\.\d+|ld-linux.*"
    extra = {name for name in needed if not re.fullmatch(system, name)}
    assert extra == {"libtorch_cpu.so"}


def test_holds_no_path_of_the_build_machine() -> None:
    dynamic = output_of("readelf", "-d", _ops.LIBRARY)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert str(ROOT).encode() not in _ops.LIBRARY.read_bytes()


def test_importing_does_not_import_the_compiler() -> None:
    """That takes longer than torch itself; whoever compiles will do it."""
    in_new_process("import sys, groupconv_ext; assert 'torch._dynamo' not in sys.modules")


def test_exports_only_its_own_functions() -> None:
    table = output_of("nm", "--dynamic", "--defined-only", _ops.LIBRARY)
    exported = {line.split()[-1] for line in table.splitlines()}
    assert {"groupconv_isa_name", "groupconv_force_isa"} <= exported
    assert all(name.startswith("groupconv_") for name in exported), exported


def test_takes_nothing_from_torch_but_the_stable_interface() -> None:
    table = output_of("nm", "--dynamic", "--undefined-only", "--demangle", _ops.LIBRARY)
    names = {line.split(maxsplit=1)[-1] for line in table.splitlines()}
    unstable = {name for name in names if re.match(r"(at|c10|torch|caffe2)::", name)}
    assert not unstable


# ---- Loading -------------------------------------------------------------------------------------


def test_imports_in_a_new_process() -> None:
    code = """
import torch
import groupconv_ext
from groupconv_ext import _ops
torch.ops.load_library(_ops.LIBRARY)  # a second time
print(groupconv_ext.Partition.contiguous(4, 4, 2))
"""
    assert "4→4" in in_new_process(code)


@pytest.mark.native
def test_every_instruction_set_runs() -> None:
    native = introspection()
    native.attach(str(_ops.LIBRARY))
    partition = groupconv_ext.Partition.random(13, 11, 3, seed=0, uneven=True)
    x = torch.randn(2, 13, 7, 9, dtype=torch.float64)
    weight = torch.randn(partition.entries, 3, 3, dtype=torch.float64)
    expected = reference.conv2d(x, weight, None, partition)
    before = native.isa_name()
    try:
        for name in runnable(native):
            native.force_isa(name)
            found = groupconv_ext.conv2d(x, weight, partition=partition, backend="native")
            torch.testing.assert_close(found, expected)
    finally:
        native.force_isa(before)


def runnable(native: Any) -> list[str]:
    """The instruction sets that were built and that this processor has."""
    has = native.cpu_features()
    avx512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    needs = {
        "avx2": ("avx2", "fma"),
        "avx512": avx512,
        "avx512_vnni": (*avx512, "avx512_vnni", "avx512_vbmi"),
        "avx512_bf16": (*avx512, "avx512_bf16"),
        "avx512_amx": (*avx512, "avx512_vnni", "avx512_vbmi", "amx_tile", "amx_bf16", "amx_int8"),
    }
    built = native.build_info()["instruction_sets"].split()
    return [name for name in built if all(has[feature] for feature in needs.get(name, ()))]


def test_import_does_not_start_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    in_new_process("import torch, groupconv_ext; assert not torch.cuda.is_initialized()")


def test_introspection_sees_the_kernels_that_run() -> None:
    code = """
import groupconv_ext, sys
from groupconv_ext import _introspect, _ops
try:
    _introspect.isa_name()
except RuntimeError:
    pass
_introspect.attach(str(_ops.LIBRARY))
print(_introspect.isa_name())
_introspect.force_isa("scalar")
print(_introspect.isa_name())
"""
    introspection()
    assert in_new_process(code, GROUPCONV_ISA="scalar").split() == ["scalar", "scalar"]


def test_introspection_refuses_nonsense() -> None:
    native = introspection()
    native.attach(str(_ops.LIBRARY))
    before = native.isa_name()
    with pytest.raises(ValueError, match="abacus"):
        native.force_isa("abacus")
    assert native.isa_name() == before
    with pytest.raises(RuntimeError, match="not loaded"):
        native.attach("/no/such/library.so")
    assert native.isa_name() == before


def test_build_info() -> None:
    native = introspection()
    info = native.build_info()
    assert info["version"] == groupconv_ext.__version__
    built = {line.split()[0] for line in attached_kernels(native)}
    assert built == set(info["instruction_sets"].split())
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("groupconv::conv2d", "CUDA")
    assert bool(info["cuda"]) == has_cuda


def attached_kernels(native: Any) -> list[str]:
    native.attach(str(_ops.LIBRARY))
    return native.kernel_list()


# ---- Instruction sets stay apart -----------------------------------------------------------------


def isa_of(path: Path) -> str:
    """The instruction set that an object file is for: the folder of its CMake target says so."""
    (target,) = (part for part in path.parts if part.endswith(".dir"))
    return target.removesuffix("_kernels.dir")


def mergeable(path: Path) -> list[str]:
    """Weak symbols, which are merged by name: an AVX-512 copy could become everyone's."""
    table = output_of("nm", "--defined-only", "--demangle", path)
    weak = [line for line in table.splitlines() if re.match(r"\S+ [WwVvu] ", line)]
    # Each file's own copy of the personality routine's address; data, the same in all.
    weak = [line for line in weak if "DW.ref." not in line]
    # Their names hold the name of their instruction set.
    return [line for line in weak if f"groupconv::cpu::{isa_of(path)}::Kernels<" not in line]


def test_no_mergeable_code_in_the_files_of_an_instruction_set() -> None:
    for path in objects("csrc/cpu/isa/*.cpp"):
        assert not mergeable(path), path


@pytest.mark.slow
def test_nor_in_a_build_for_a_debugger(tmp_path: Path) -> None:
    """Nothing is inlined there unless these files are optimized all the same."""
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    cmake, ninja = (shutil.which(tool, path=search) for tool in ("cmake", "ninja"))
    if not cmake or not ninja or not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the sources, cmake and ninja")
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_MAKE_PROGRAM": ninja,
        "GROUPCONV_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
    }
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(configure, check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    isa_files = [c["command"] for c in commands if "csrc/cpu/isa/" in c["file"]]
    assert isa_files
    for command in isa_files:
        assert re.findall(r" (-O\w)", command)[-1:] == ["-O2"], command
    target = "CMakeFiles/scalar_kernels.dir/csrc/cpu/isa/convolve.cpp.o"
    subprocess.run([ninja, "-C", tmp_path, target], check=True, capture_output=True)
    assert not mergeable(tmp_path / target)


def test_the_files_of_an_instruction_set_run_nothing_at_load() -> None:
    for path in objects("csrc/cpu/isa/*.cpp"):
        assert ".init_array" not in output_of("objdump", "--section-headers", path), path


@pytest.mark.parametrize(
    ("registers", "ours"),
    [("zmm", ("avx512",)), ("ymm", ("avx2", "avx512"))],
)
def test_wide_registers_only_where_asked_for(registers: str, ours: tuple[str, ...]) -> None:
    folders = ("core", "cpu", "cpu/isa", "torch")
    for path in objects(*(f"csrc/{folder}/*.cpp" for folder in folders)):
        if not isa_of(path).startswith(ours):
            code = output_of("objdump", "--disassemble", "--no-show-raw-insn", path)
            assert f"%{registers}" not in code, path


# ---- CUDA ----------------------------------------------------------------------------------------


def resource_reports() -> Iterator[tuple[str, str]]:
    """Kernel and what ptxas says about it, for every kernel and architecture."""
    for path in sorted(OBJECTS.glob("cuda_kernels.dir/**/*.ptxas.txt")):
        for part in path.read_text().split("Compiling entry function ")[1:]:
            kernel, _, usage = part.partition("\n")
            yield f"{path.name}: {kernel}", usage


def test_no_kernel_spills_registers() -> None:
    reports = dict(resource_reports())
    if not reports:
        pytest.skip(f"no CUDA build in {BUILD}")
    spilling = {
        kernel
        for kernel, usage in reports.items()
        if "0 bytes spill stores, 0 bytes spill loads" not in usage
    }
    assert not spilling


def disassembler() -> str | Path:
    """The CUDA toolkit's, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        found = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.exists() and shutil.which("cuobjdump") is None:
            return found
    return "cuobjdump"


@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_hopper_multiplies_by_warp_groups(element: str) -> None:
    """Four kernels of four products, which run on while the threads do."""
    (path,) = objects(f"csrc/cuda/product_wgmma_{element}.cu")
    code = output_of(disassembler(), "--gpu-architecture", "sm_90a", "--dump-sass", path)
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.count(" HGMMA.64x") == 4, kernel.splitlines()[0]
        assert " HMMA." not in kernel
    older = output_of(disassembler(), "--gpu-architecture", "sm_80", "--dump-sass", path)
    assert "Function : " in older
    assert "MMA." not in older
    # What ptxas says where it can't let products run on: it waits after each of them then.
    assert "serialized" not in path.with_suffix(".ptxas.txt").read_text()


def test_a_spill_fails_the_build(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "print(sys.argv[3], file=sys.stderr)\n"
    )
    output = tmp_path / "kernel.o"
    report = (
        "ptxas info    : Function properties for my_kernel\n"
        "    8 bytes stack frame, {} bytes spill stores, 4 bytes spill loads"
    )

    def build(spilled: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "tools" / "refuse_spills.py", sys.executable, compiler]
        command += ["-o", output, spilled]
        return subprocess.run(command, capture_output=True, text=True)

    bad = build(report.format(12))
    assert bad.returncode == 1
    assert "my_kernel" in bad.stderr
    assert not output.exists()

    good = build(report.replace("4 bytes spill loads", "0 bytes spill loads").format(0))
    assert good.returncode == 0, good.stderr
    assert output.exists()
    assert "my_kernel" in output.with_suffix(".ptxas.txt").read_text()
