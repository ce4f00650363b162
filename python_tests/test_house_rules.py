"""The rules that hold the house together (docs/design), checked by reading the sources.

Nothing here imports the package: the rules must hold before anything is built.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "groupconv_ext"
NATIVE = ROOT / "csrc"

# From the ground up; a module imports from the floors below its own and from inside it. ROOF is the
# package itself: what `import groupconv_ext` loads lies below it, what starts from there above.
ROOF = "groupconv_ext"
FLOORS = (
    *("_checks", "_per_device", "_layout", "window", "partition"),
    *(
        "reference",
        "_introspect",
        "_fakes",
        "_ops",
        "operations",
        "autograd",
        "prologue",
        "masked",
        "backends",
        "functional",
        "learned",
        "kept_weights",
    ),
    *("chain", "separable", "two_level", "quantization"),
    *("nn", "models", "counting"),
    *("deploy", "train", "parallel"),
    *("report", "doctor"),
    ROOF,
    *("bench", "tables", "inspection", "cli", "__main__"),
)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def native_files(*suffixes: str) -> list[Path]:
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in suffixes)


def project_imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and floor of every import of this project below `tree`."""
    package = ("groupconv_ext", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parent, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "groupconv_ext":
                yield node.lineno, rest[0] if rest and rest[0] in FLOORS else ROOF


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", ROOF)
    assert own in FLOORS, f"{own} has no floor yet: give it one in FLOORS"
    wrong = [
        f"line {line}: {own} imports {floor}"
        for line, floor in project_imports(path, ast.parse(path.read_text()))
        if floor != own and FLOORS.index(floor) > FLOORS.index(own)
    ]
    assert not wrong


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_of_the_project_inside_a_function(path: Path) -> None:
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    )
    hidden = [line for function in functions for line, _ in project_imports(path, function)]
    assert not hidden, f"lines {hidden}"


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def allowed(path: Path, *places: str) -> bool:
    return any(path.is_relative_to(NATIVE / place) for place in places)


@pytest.mark.parametrize(
    ("headers", "places"),
    [
        (r"(torch|ATen|c10|caffe2)/", ("torch",)),
        (r"cuda|cooperative_groups|mma\.h|cub/", ("cuda", "torch/cuda_device.h")),
        (r"(pybind11/|Python\.h)", ("python",)),
        (r"(immintrin|xmmintrin|x86intrin|cpuid)\.h", ("cpu", "torch/threads.cpp")),
    ],
    ids=["torch", "cuda", "python", "intrinsics"],
)
def test_headers_stay_where_they_belong(headers: str, places: tuple[str, ...]) -> None:
    strays = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in native_files(".h", ".cuh", ".cpp", ".cu")
        if not allowed(path, *places)
        for header in includes(path)
        if re.match(headers, header)
    ]
    assert not strays


def test_native_floors_only_go_down() -> None:
    below = {"core": {"core"}, "cpu": {"core", "cpu"}, "cuda": {"core", "cuda"}}
    strays = [
        f"{path.relative_to(ROOT)} includes {header}"
        for place, floors in below.items()
        for path in native_files(".h", ".cuh", ".cpp", ".cu")
        if allowed(path, place)
        for header in includes(path)
        if (folder := header.split("/")[0]) in {"core", "cpu", "cuda", "torch", "python"}
        and folder not in floors
    ]
    assert not strays


# The rooms of csrc/cpu, from the ground up; "cpu" is what lies beside them.
CPU_FLOORS = (
    {"processor"},
    {"vector"},
    {"cpu"},
    {"staging", "products"},
    {"drivers", "gradients", "depthwise", "masked"},
    {"isa"},
)


def test_cpu_rooms_only_go_down() -> None:
    level = {room: number for number, floor in enumerate(CPU_FLOORS) for room in floor}
    strays = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in native_files(".h", ".cpp")
        if allowed(path, "cpu")
        for header in includes(path)
        if header.startswith("cpu/")
        if (own := path.parent.name) != (other := Path(header).parent.name)
        and level[other] >= level[own]
    ]
    assert not strays


def test_cmake_names_every_source() -> None:
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    found = {str(path.relative_to(ROOT)) for path in native_files(".cpp", ".cu")}
    assert listed == found


def test_headers_are_included_once() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in native_files(".h", ".cuh")
        if "#pragma once\n" not in path.read_text()
    ]
    assert not missing


def test_nothing_is_left_for_later() -> None:
    reminder = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    folders = ("csrc", "groupconv_ext", "python_tests", "benches", "tools", "docs", "examples")
    suffixes = {".py", ".pyi", ".h", ".cuh", ".cpp", ".cu", ".md", ".css", ".js"}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        if path.suffix in suffixes or path.name in ("Makefile", "CMakeLists.txt")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if reminder.search(line)
    ]
    assert not found
