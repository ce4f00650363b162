"""Hand the native build to CMake; everything else is in pyproject.toml.

Environment variables that are CMake options of the same name:

- ``GROUPCONV_CUDA=AUTO|ON|OFF``: build the CUDA kernels (AUTO: if nvcc is found).
- ``GROUPCONV_SIMD=ON|OFF``: build the AVX2 and AVX-512 kernels.
- ``GROUPCONV_EMULATE_AMX=ON|OFF``: have matrix registers in software, for tests.
- ``GROUPCONV_SANITIZE=address,undefined``: instrument the native code.

``GROUPCONV_BUILD_DIR`` is the build folder (``build/cmake``). It is kept, so that the next build
compiles only what changed.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / os.environ.get("GROUPCONV_BUILD_DIR", "build/cmake")
OPTIONS = ("GROUPCONV_CUDA", "GROUPCONV_SIMD", "GROUPCONV_EMULATE_AMX", "GROUPCONV_SANITIZE")


def find_tool(package: str, folder_name: str) -> str | None:
    """The program that a Python package of the same name brings along, else the one on PATH.

    The package goes first: PATH knows nothing of a virtual environment that is not activated, and
    the system's cmake may be older than the build needs.
    """
    try:
        folder = getattr(importlib.import_module(package), folder_name)
    except (ImportError, AttributeError):
        folder = None
    return (folder and shutil.which(package, path=str(folder))) or shutil.which(package)


def reusable(cache: Path, generator: str) -> bool:
    """CMake refuses a build folder of another generator, or one that was moved with its sources."""
    if not cache.exists():
        return True
    lines = cache.read_text().splitlines()
    return (
        f"CMAKE_GENERATOR:INTERNAL={generator}" in lines
        and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}" in lines
    )


@functools.cache  # two extensions, one build
def build_native() -> None:
    """Configure and build with CMake."""
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    ninja = find_tool("ninja", "BIN_DIR")
    if cmake is None:
        raise SystemExit("groupconv-ext needs CMake 3.25 or later to build: pip install cmake")
    generator = "Ninja" if ninja else "Unix Makefiles"

    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD_DIR), "-G", generator]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    if ninja:
        # Named on every run: under build isolation it lies in a new temporary folder each time.
        configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    if not reusable(BUILD_DIR / "CMakeCache.txt", generator):
        configure.append("--fresh")
    for option in OPTIONS:
        # Unset means the default, not what the last build in this folder was told.
        value = os.environ.get(option)
        configure.append(f"-D{option}={value}" if value else f"-U{option}")

    build = [cmake, "--build", str(BUILD_DIR)]
    if "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
        build += ["--parallel", str(os.cpu_count() or 1)]

    for command in (configure, build):
        status = subprocess.run(command, cwd=ROOT).returncode
        if status != 0:
            raise SystemExit(f"the native build failed (exit {status}): {' '.join(command)}")


class CMakeBuild(build_ext):
    """Copies what CMake built to where setuptools wants it.

    The two shared objects are two extensions because setuptools then knows where each belongs in a
    wheel, in an editable install and in a build in place.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """No interpreter tag for the op library: torch loads it, and it is no Python module."""
        if fullname.rpartition(".")[2] == "_native":
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        """Build once, copy each."""
        build_native()
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # A new file, since writing into a library would crash the processes that have it loaded.
        destination.unlink(missing_ok=True)
        shutil.copy2(BUILD_DIR / "groupconv_ext" / destination.name, destination)


setup(
    license="Apache-2.0",
    ext_modules=[
        Extension("groupconv_ext._native", sources=[]),
        Extension("groupconv_ext._introspect", sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
