"""Digits by networks of equal cost: every method in the same frame, as wide as the budget allows.

A 3×3 stem from one channel, three 3×3 layers of the method (the second with stride 2), batch norm
and ReLU after each, the mean over the pixels, a linear layer. Widths are chosen such that the
multiply-adds of one image are those of plain groups within five percent. Layers that learn their
groups do so for the first half of training and are frozen then; what they cost in the end is theirs
to choose (FLGC) or held to the budget by DGConv's constraint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from images import SIDE, load
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

EPOCHS, BATCH = 10, 64
BUDGET = 8  # groups of the plain network: everybody's share of the dense cost

Layer = Callable[[int, int], nn.Module]  # channels, stride


@dataclass(frozen=True)
class Method:
    name: str
    width: int
    layer: Layer


def _window(stride: int) -> dict[str, Any]:
    return {"stride": stride, "padding": 1, "bias": False}


METHODS = (
    Method("dense, narrow", 23, lambda c, s: nn.Conv2d(c, c, 3, **_window(s))),
    Method("groups", 64, lambda c, s: gc.nn.PartitionedConv2d(c, c, 3, **_window(s), groups=8)),
    Method("shuffle", 64, lambda c, s: gc.nn.ShuffledConv2d(c, c, 3, **_window(s), groups=8)),
    Method("FLGC", 64, lambda c, s: gc.nn.FLGConv2d(c, c, 3, **_window(s), groups=8)),
    Method("DGConv", 64, lambda c, s: gc.nn.DGConv2d(c, c, 3, **_window(s), gates=[1] * 6)),
    Method("GC-2L", 56, lambda c, s: gc.nn.TwoLevelConv2d(c, c, 3, **_window(s), groups=8)),
    Method(
        "IGC",
        80,
        lambda c, s: gc.nn.InterleavedConv2d(c, c, 3, **_window(s), primary_groups=20),
    ),
)


def network(method: Method) -> nn.Sequential:
    width = method.width
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False)]
    for stride in (1, 2, 1):
        layers += [nn.BatchNorm2d(width), nn.ReLU(), method.layer(width, stride)]
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def multiply_adds(model: nn.Module) -> int:
    """Of one image, in convolutions and linear layers; learned layers with the groups of now."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        pixels = output[0, 0].numel() if output.dim() == 4 else 1
        if isinstance(layer, gc.nn.GroupedLayer):
            weights = layer.partition().entries * layer.weight[0, 0].numel()
        else:
            weights = sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
        total += weights * pixels

    leaves = [m for m in model if not isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_hook(count) for m in leaves]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, SIDE, SIDE))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return total


def run(method: Method, task: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """One training; accuracy and cost of what came out."""
    (images, digits), (test_images, test_digits) = load(task, seed)
    torch.manual_seed(seed)
    model = network(method)
    groups = gc.nn.parameter_groups(model, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    learned = [layer for layer in model if isinstance(layer, gc.nn.GroupedLayer)]
    gated = any(isinstance(layer, gc.nn.DGConv2d) for layer in learned)
    constraint = gc.nn.ResourceConstraint(model, BUDGET) if gated else None
    for step in range(steps):
        if step == steps // 2:
            for layer in learned:
                layer.freeze_structure()
        batch = torch.randint(len(images), (BATCH,))
        loss = functional.cross_entropy(model(images[batch]), digits[batch])
        if constraint is not None and step < steps // 2:
            loss = constraint(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    cost = multiply_adds(model)
    with torch.no_grad():
        before = model(test_images)
        after = gc.nn.convert(model)(test_images)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    return {
        "method": method.name,
        "seed": seed,
        "accuracy": float((after.argmax(1) == test_digits).float().mean()),
        "multiply_adds": cost,
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": [
            sum(1 for size in p.sizes if min(size) > 0) for p in gc.nn.structure(model).values()
        ],
    }
