"""What the documentation shows is true: its examples run as printed, its links lead somewhere.

The Python blocks of a page run one after another, as a reader would type them; a ``text`` block
right behind one is what it prints.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy.py"
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {DEPLOY})
COMPILER = os.environ.get("CXX") or shutil.which("g++")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benches/**/*.md")])
DRAW = {"partitions.md"}
NEEDS = {"draw_partitions.py": ("matplotlib",), "flgc_digits.py": ("sklearn",)}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path) -> None:
    for name in NEEDS.get(path.name, ()):
        pytest.importorskip(name)
    assert printed_by([sys.executable, path], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_deploys_without_python(tmp_path: Path) -> None:
    found, kernels = printed_by([sys.executable, DEPLOY, "network.pt2"], tmp_path).splitlines()
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = [COMPILER, "-std=c++20", DEPLOY.with_suffix(".cpp"), "-o", "deploy", "-w"]
    command += ["-I", include, "-I", include / "torch" / "csrc" / "api" / "include", "-L", lib]
    printed_by([*command, "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"], tmp_path)
    library = kernels.removeprefix("the kernels: ")
    assert printed_by(["./deploy", "network.pt2", library], tmp_path).strip() == found


def printed_by(command: list[object], folder: Path) -> str:
    arguments = [str(argument) for argument in command]
    run = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_blocks_of_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name in DRAW:
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    page = path.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block, behind in pairwise([*BLOCK.finditer(page), None]):
        language, code = block.groups()
        if language != "python":
            continue
        above = "\n" * page.count("\n", 0, block.start(2))  # so that a traceback names the line
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(above + code, str(path), "exec"), names)
        if behind and behind[1] == "text" and not page[block.end() : behind.start()].strip():
            assert printed.getvalue() == behind[2]


def test_the_readme_shows_the_first_example() -> None:
    _, _, code = (ROOT / "examples" / "first_steps.py").read_text().split('"""', 2)
    assert f"```python\n{code.strip()}\n```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_of_a_page(path: Path) -> None:
    links = LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8")))
    local = [link for link in links if not link.startswith(("https://", "http://"))]
    missing = [link for link in local if not (path.parent / link).exists()]
    assert not missing
