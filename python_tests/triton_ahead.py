"""Compiles the Triton kernels for GPUs that are not here, and prints what became of them as JSON.

Run as a program of its own, because kernels that were defined for the interpreter cannot be
compiled. Each case calls the operations on meta tensors; what they would launch is compiled
instead, with the specialisation that a launch would choose.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from groupconv_ext.backends.triton import ops
from groupconv_ext.backends.triton.operations import TRITON_OPERATIONS
from groupconv_ext.partition import Partition
from groupconv_ext.window import Window

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")

POINTWISE = Window(1, 1, 0, 0, 0, 0, 1, 1)
SPATIAL = Window(1, 1, 1, 1, 1, 1, 1, 1)
PERMUTED = Partition.random(256, 256, 8, seed=0)
SMALL_GROUPS = Partition.random(128, 128, 32, seed=0)
DEPTHWISE = Partition.shuffled(256, 256, 256)
OVERLAPPING = Partition(64, 64, [range(40), range(24, 64)], [range(32), range(32, 64)])


def image(channels: int, dtype: torch.dtype, channels_last: bool, size: int = 28) -> torch.Tensor:
    x = torch.empty(8, channels, size, size, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def calls(
    partition: Partition, window: Window, dtype: torch.dtype, channels_last: bool
) -> Iterator[tuple[str, Any]]:
    """Forward pass and both gradients."""
    x = image(partition.in_channels, dtype, channels_last)
    grad = image(partition.out_channels, dtype, channels_last)
    kernel = (1, 1) if window == POINTWISE else (3, 3)
    weight = torch.empty(partition.entries, *kernel, dtype=dtype, device="meta")
    run, shared = TRITON_OPERATIONS, (partition, window)
    yield "forward", partial(run.conv2d, x, weight, None, grad, *shared, "relu")
    yield (
        "input gradient",
        partial(run.input_grad, grad, weight, *shared, (28, 28), channels_last),
    )
    yield "weight gradient", partial(run.weight_grad, grad, x, *shared, kernel)


CASES = {
    "1×1 f32 NCHW": (PERMUTED, POINTWISE, torch.float32, False),
    "1×1 bf16 NHWC": (PERMUTED, POINTWISE, torch.bfloat16, True),
    "3×3 f16 NHWC": (SMALL_GROUPS, SPATIAL, torch.float16, True),
    "3×3 bf16 NCHW": (SMALL_GROUPS, SPATIAL, torch.bfloat16, False),
    "depthwise bf16 NHWC": (DEPTHWISE, SPATIAL, torch.bfloat16, True),
    "overlapping f32 NHWC": (OVERLAPPING, POINTWISE, torch.float32, True),
}


def launched(call: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every kernel that ``call`` would launch, with its arguments."""
    found = []
    original = ops.launch_kernel
    ops.launch_kernel = lambda kernel, grid, x, settings: found.append((kernel, settings))
    try:
        call()
    finally:
        ops.launch_kernel = original
    return found


def source(kernel: Any, settings: dict[str, Any]) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = settings[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible = True  # what PyTorch allocates is aligned
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """What ``cuobjdump`` says of the machine code: registers, stack, local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [program, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def main() -> None:
    report = []
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        for name, case in CASES.items():
            for direction, call in calls(*case):
                for kernel, settings in launched(call):
                    options = {key: settings[key] for key in LAUNCH_OPTIONS if key in settings}
                    compiled = triton.compile(source(kernel, settings), target, options)
                    ptx = compiled.asm["ptx"]
                    report.append(
                        {
                            "capability": capability,
                            "case": name,
                            "direction": direction,
                            "kernel": kernel.__name__,
                            "dynamic_shared": compiled.metadata.shared,
                            "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
                            "wide_loads": len(re.findall(r"ld\.global[\w.]*\.v4\b", ptx)),
                            "bank_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
                            **resources(compiled.asm["cubin"]),
                        }
                    )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
