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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from functorch.compile import aot_function
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from groupconv_ext.backends.triton import (
    TRITON_LABELLED,
    TRITON_OPERATIONS,
    chain,
    chain_input_grad,
    chain_ops,
    load,
    mask_ops,
    ops,
)
from groupconv_ext.partition import Partition
from groupconv_ext.window import POINTWISE, Window

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")
VECTOR_LOADS = re.compile(r"ld\.global[\w.:]*\.v[24]|cp\.async\.cg")
ASYNCHRONOUS_COPIES = re.compile(r"cp\.async|ld\.global\.nc")
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)")

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


def learned_calls() -> Iterator[tuple[str, Any]]:
    """What a layer adds that learns its groups, and the two-level epilogue."""
    x, grad = (image(256, torch.bfloat16, True) for _ in range(2))
    weight = torch.empty(256, 256, 1, 1, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(256, dtype=torch.int32, device="meta")
    logits = torch.empty(256, 8, dtype=torch.float32, device="meta")
    gates = torch.empty(8, device="meta")
    run, pair = TRITON_LABELLED, (labels, labels)
    yield "labelled forward", partial(run.labelled_conv2d, x, weight, None, *pair, 8, *POINTWISE)
    yield (
        "labelled weight gradient",
        partial(run.labelled_conv2d_weight_grad, grad, x, *pair, 8, 1, 1, *POINTWISE),
    )
    yield "masked weight", partial(run.mask_weight, weight, *pair)
    yield "logits", partial(run.label_grad, weight, weight, logits, logits, *pair, False, True)
    yield "gates", partial(run.kronecker_grad, weight, weight, gates)
    within, restrict = Partition.contiguous(256, 256, 8), Partition.contiguous(256, 8, 8)
    packed = torch.empty(within.entries, 3, 3, dtype=torch.bfloat16, device="meta")
    level = torch.empty(restrict.entries, 3, 3, dtype=torch.bfloat16, device="meta")
    coarse = torch.empty(256, 8, dtype=torch.bfloat16, device="meta")
    operands = (x, packed, level, coarse, None, within, restrict, SPATIAL)
    yield "two levels", partial(TRITON_OPERATIONS.two_level, *operands)


def chain_calls() -> Iterator[tuple[str, Any]]:
    """Two stages of IGCV2, forward and back."""
    stages = [Partition.contiguous(256, 256, 16), Partition.interleaved(256, 256, 16)]
    for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False)):
        x = image(256, dtype, channels_last)
        weights = [torch.empty(p.entries, 1, 1, dtype=dtype, device="meta") for p in stages]
        bias = torch.empty(256, dtype=dtype, device="meta")
        yield "chain", partial(chain, x, weights, bias, stages, "relu")
        arguments = (x, weights, stages, channels_last)
        yield "chain, input gradient", partial(chain_input_grad, *arguments)


def large_calls() -> Iterator[tuple[str, Any]]:
    """With the offsets of 64 bits that tensors of more than 2³¹ elements need."""

    def large(call: Callable[[], object]) -> None:
        with patch.object(ops, "_LARGEST", 0), patch.object(mask_ops, "_LARGEST", 0):
            call()

    for partition in (PERMUTED, DEPTHWISE):
        for direction, call in calls(partition, SPATIAL, torch.bfloat16, True):
            yield f"large {direction}", partial(large, call)
    for direction, call in learned_calls():
        if direction in ("masked weight", "logits", "gates"):
            yield f"large {direction}", partial(large, call)


CASES: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "1×1 f32 NCHW": lambda: calls(PERMUTED, POINTWISE, torch.float32, False),
    "1×1 bf16 NHWC": lambda: calls(PERMUTED, POINTWISE, torch.bfloat16, True),
    "3×3 f16 NHWC": lambda: calls(SMALL_GROUPS, SPATIAL, torch.float16, True),
    "3×3 bf16 NCHW": lambda: calls(SMALL_GROUPS, SPATIAL, torch.bfloat16, False),
    "depthwise bf16 NHWC": lambda: calls(DEPTHWISE, SPATIAL, torch.bfloat16, True),
    "overlapping f32 NHWC": lambda: calls(OVERLAPPING, POINTWISE, torch.float32, True),
    "learned bf16 NHWC": learned_calls,
    "chain": chain_calls,
    "64-bit offsets": large_calls,
}


def launched(call: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every kernel that ``call`` would launch, with its arguments."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def note(kernel: Any, grid: object, x: object, settings: dict[str, Any]) -> None:
        found.append((kernel, settings))

    with ExitStack() as patches:
        for module in (ops, mask_ops, chain_ops):
            patches.enter_context(patch.object(module, "launch_kernel", note))
        call()
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


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """What becomes of every kernel of every case."""
    target = GPUTarget("cuda", capability, 32)
    seen = set()
    for name, case in CASES.items():
        for direction, call in case():
            if capability < 90 and ("large" in direction or direction == "input gradient"):
                continue  # other settings of the same kernels; looked at once
            for kernel, settings in launched(call):
                options = {key: settings[key] for key in LAUNCH_OPTIONS if key in settings}
                module = source(kernel, settings)
                key = (module.hash(), tuple(options.items()))
                if key in seen:
                    continue
                seen.add(key)
                found = triton.compile(module, target, options)
                ptx = found.asm["ptx"]
                yield {
                    "capability": capability,
                    "case": name,
                    "direction": direction,
                    "kernel": kernel.__name__,
                    "dynamic shared": found.metadata.shared,
                    "matrix instructions": len(MATRIX_INSTRUCTIONS.findall(ptx)),
                    "vector loads": len(VECTOR_LOADS.findall(ptx)),
                    "asynchronous copies": len(ASYNCHRONOUS_COPIES.findall(ptx)),
                    **resources(found.asm["cubin"]),
                }


class NoGpu:
    """A driver for a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def traced() -> list[str]:
    """What ``torch.compile`` makes of the operations: the targets in a graph of GPU tensors."""
    triton.runtime.driver.set_active(NoGpu())
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def derived(self: Partition, make: Any, *settings: int, device: Any) -> torch.Tensor:
        table = torch.from_numpy(make(self, *settings))
        return torch.empty(table.shape, dtype=table.dtype, device=device)

    def step(
        x: torch.Tensor, weight: torch.Tensor, pointwise: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        run, shared = TRITON_OPERATIONS, (SMALL_GROUPS, SPATIAL)
        y = run.conv2d(x, weight, None, None, *shared, "relu")
        grad_x = run.input_grad(y, weight, *shared, (8, 8), False)
        both = chain(x, [pointwise] * 2, None, [SMALL_GROUPS] * 2, "none")
        return y, grad_x, run.weight_grad(y, x, *shared, (3, 3)), both

    with patch.object(Partition, "derived", derived), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 128, 8, 8, device="cuda")
        weight = torch.empty(SMALL_GROUPS.entries, 3, 3, device="cuda")
        operands = (x, weight, torch.empty(SMALL_GROUPS.entries, 1, 1, device="cuda"))
        aot_function(step, fw_compiler=keep, keep_inference_input_mutations=True)(*operands)
    (graph,) = graphs
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def main() -> None:
    load()
    kernels = [entry for capability in sys.argv[1:] for entry in compiled(int(capability))]
    json.dump({"kernels": kernels, "graph": traced()}, sys.stdout)


if __name__ == "__main__":
    main()
