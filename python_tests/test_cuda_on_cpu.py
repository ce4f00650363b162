"""The CUDA kernels, run on the CPU: their arithmetic and their bounds need no GPU to be checked.

`cuda_on_cpu/cuda_runtime.h` turns the kernel headers into plain C++, which is compiled here with
the address and undefined-behaviour sanitizers.
"""

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from groupconv_ext import Partition, reference

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not CSRC.is_dir(), reason="needs g++ and the native sources"
)


@dataclass
class Problem:
    partition: Partition
    batch: int = 1
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    channels_last: bool = False
    epilogue: bool = False
    activation: str = "none"
    narrow: bool = False
    backwards: bool = False
    table: np.ndarray | None = None
    input: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        p = self.partition
        self.out_size = reference.output_size(
            self.size, self.kernel, self.stride, self.padding, self.dilation
        )

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=make)

        self.input = tensor(self.batch, p.in_channels, *self.size)
        self.weight = tensor(p.entries, *self.kernel)
        self.bias = tensor(p.out_channels) if self.epilogue else None
        shape = (self.batch, p.out_channels, *self.out_size)
        self.residual = tensor(*shape) if self.epilogue else None
        if self.table is None:
            self.table = p.cpu_table.numpy()

    def expected(self) -> torch.Tensor:
        return reference.conv2d(
            self.input,
            self.weight,
            self.bias,
            self.partition,
            self.stride,
            self.padding,
            self.dilation,
            self.activation,
            self.residual,
        )

    def run(self, program: Path, folder: Path) -> torch.Tensor:
        p = self.partition
        numbers = [
            *(self.batch, p.in_channels, *self.size, p.out_channels, *self.out_size),
            *(*self.kernel, *self.stride, *self.padding, *self.dilation),
            *(self.channels_last, self.bias is not None, self.residual is not None),
            *(list(reference.activations).index(self.activation), p.entries, len(self.table)),
            *(self.narrow, self.backwards),
        ]
        order = (0, 2, 3, 1) if self.channels_last else (0, 1, 2, 3)
        back = (0, 3, 1, 2) if self.channels_last else (0, 1, 2, 3)
        arrays = [self.input.permute(order).numpy(), self.weight.numpy()]
        arrays += [x.numpy() for x in (self.bias, self.residual) if x is not None]
        given, found = folder / "problem", folder / "result"
        given.write_bytes(
            struct.pack(f"={len(numbers)}q", *map(int, numbers))
            + self.table.astype(np.int32).tobytes()
            + b"".join(array.tobytes() for array in arrays)
        )
        run = subprocess.run([program, given, found], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        shape = [(self.batch, p.out_channels, *self.out_size)[i] for i in order]
        return torch.from_numpy(np.fromfile(found).reshape(shape)).permute(back)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "conv2d_forward"
    command = [COMPILER, "-std=c++20", "-O1", "-g", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-I", HERE / "cuda_on_cpu", "-I", CSRC]
    command += [HERE / "cuda_on_cpu" / "conv2d_forward.cpp", "-o", path]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return path


def overlapping() -> Partition:
    inputs = [[0, 3, 5], [], [5, 1, 0, 6, 2]]
    outputs = [[4, 0], [2, 5], [1, 3, 6]]
    return Partition.from_lists(inputs, outputs, in_channels=8, out_channels=7)


CASES = {
    "pointwise": Problem(Partition.contiguous(16, 8, 2), batch=2),
    "wider than a tile": Problem(Partition.random(40, 140, 2, seed=1), size=(9, 9)),
    "deeper than a step": Problem(Partition.random(140, 6, 2, seed=2, uneven=True)),
    "depthwise": Problem(
        Partition.contiguous(12, 12, 12), kernel=(3, 3), padding=(1, 1, 1, 1), size=(20, 17)
    ),
    "overlap, no inputs": Problem(
        overlapping(), kernel=(3, 2), stride=(2, 3), padding=(0, 2, 3, 1), dilation=(2, 1)
    ),
    "more padding than image": Problem(
        Partition.interleaved(4, 4, 2), size=(1, 2), kernel=(2, 2), padding=(3, 3, 3, 3)
    ),
    "more groups than threads": Problem(Partition.random(1200, 1200, 1200, seed=3), size=(1, 1)),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(
    program: Path, tmp_path: Path, name: str, channels_last: bool, narrow: bool
) -> None:
    problem = CASES[name]
    problem.channels_last, problem.narrow, problem.backwards = channels_last, narrow, not narrow
    torch.testing.assert_close(problem.run(program, tmp_path), problem.expected())


@pytest.mark.parametrize("activation", list(reference.activations))
def test_epilogue(program: Path, tmp_path: Path, activation: str) -> None:
    problem = Problem(overlapping(), batch=2, epilogue=True, activation=activation)
    problem.input[0, :, 0, 0] = float("nan")
    torch.testing.assert_close(problem.run(program, tmp_path), problem.expected(), equal_nan=True)


def hostile_tables() -> dict[str, np.ndarray]:
    sound = overlapping().cpu_table.numpy()
    groups, reads = int(sound[2]), int(sound[3])
    in_offsets, out_offsets = 4, 4 + groups + 1
    inputs = out_offsets + groups + 1
    outputs = inputs + reads
    changes = {
        "in_channels": (0, 9),
        "out_channels": (1, 2**31 - 1),
        "no groups": (2, 0),
        "negative groups": (2, -3),
        "too many groups": (2, 2**31 - 1),
        "negative reads": (3, -(2**31)),
        "too many reads": (3, 2**31 - 1),
        "first offset": (in_offsets, -1),
        "falling offset": (in_offsets + 1, 100),
        "negative offset": (out_offsets + 1, -5),
        "last offset": (out_offsets + groups, 100),
        "input too large": (inputs, 8),
        "input negative": (inputs + 1, -1),
        "output too large": (outputs, 7),
        "output negative": (outputs + 2, -(2**31)),
        "output twice": (outputs, int(sound[outputs + 1])),
        "other block sizes": (out_offsets + 1, 1),
    }
    tables = {}
    for name, (position, value) in changes.items():
        tables[name] = sound.copy()
        tables[name][position] = value
    tables["too short"] = sound[: 8 + overlapping().out_channels]
    return tables


@pytest.mark.parametrize("name", hostile_tables())
def test_hostile_table_gives_nan_and_touches_nothing(
    program: Path, tmp_path: Path, name: str
) -> None:
    problem = Problem(overlapping(), kernel=(3, 3), table=hostile_tables()[name])
    assert problem.run(program, tmp_path).isnan().all()
