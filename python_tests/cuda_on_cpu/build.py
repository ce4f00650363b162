"""Builds the CUDA kernels, their launchers and their ops as operations on CPU tensors.

Everything but the lookup of a stream is compiled as it is, by g++ and with the headers beside this
in the place of CUDA's. The operations are called ``torch.ops.groupconv_on_cpu.*``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
NAMESPACE = "groupconv_on_cpu"


def build(folder: Path) -> Path:
    """The library in a folder of its own under ``folder``, compiled unless it is there already."""
    assert COMPILER is not None
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-fvisibility=hidden", f"-Dgroupconv={NAMESPACE}"]
    flags += ["-DGROUPCONV_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-DGROUPCONV_MOST_BLOCKS=3"]
    flags += ["-I", str(HERE), "-I", str(CSRC), "-isystem", str(torch_folder / "include")]
    # The address sanitizer has to be in the process before python is: `make sanitize` does that.
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    if sanitized:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        sanitizers += ["-fno-sanitize=null,object-size,pointer-overflow"]
    else:
        # A GPU reads and writes a type at multiples of its size only: so must this.
        sanitizers = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    sources = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("torch/cuda_*.cpp"), *CSRC.glob("core/*.cpp")]
    sources += [CSRC / "torch" / "library.cpp", *HERE.glob("*.cpp")]
    sources.remove(CSRC / "torch" / "cuda_device.cpp")
    made_of = hashlib.sha256(" ".join([COMPILER, *flags, *sanitizers]).encode())
    headers = (path for path in HERE.rglob("*.*") if path.suffix in (".cpp", ".h", ".cuh"))
    for path in sorted([*CSRC.rglob("*.*"), *headers]):
        made_of.update(path.read_bytes())
    folder = folder / f"groupconv_cuda_on_cpu_{made_of.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    library = folder / "cuda_on_cpu.so"

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        run([*flags, *sanitizers, "-x", "c++", "-c", source, "-o", target])
        return target

    with (folder / "lock").open("w") as lock:  # several processes may test at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, sorted(sources)))
            linked = library.with_suffix(".linked")
            link = ["-shared", *sanitizers, *objects, "-L", torch_folder / "lib", "-ltorch_cpu"]
            run([*link, "-o", linked])
            linked.rename(library)
    return library


def run(arguments: list[object]) -> None:
    command = [COMPILER, *map(str, arguments)]
    # Not under the sanitizer's runtime itself, where a compiler takes twice as long.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
