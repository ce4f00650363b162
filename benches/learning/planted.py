"""Planted groups: can a layer find the groups that made its data?

The teacher is a 1×1 convolution in groups that nobody tells the student: a random ragged partition
for FLGC, random gates for DGConv. Rows of its weight have length one, its output has noise of
variance 0.01 on top, its input is white. The student sees both and minimises the squared error.

What FLGC needs, each found by leaving it out:

- **More labels than groups** (twice as many). Two of the teacher's groups under one label cost
  nothing, since the weights between them become zero, and nothing pulls them apart again.
- **Weight decay while the structure learns.** Off the mask a weight moves straight through and
  feels no consequence: it grows for ever, and when its connection opens the output explodes. With
  decay 1 it comes to rest where it would be without the mask. Decay ends with the structure.
- **Several starts.** Half of them still end with groups merged. Those are recognised without the
  teacher: of the starts that fit, keep the one with the fewest connections.

DGConv finds its gates when all start open: then every weight has seen the data before its gate
closes. A gate that starts closed looks at weights that are still random.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

CHANNELS, GROUPS, LABELS = 32, 4, 8
NOISE = 0.1
LEARNING, TUNING = 300, 150  # steps: while the structure learns, after it was frozen
STARTS = 5


def labels_of(partition: gc.Partition) -> torch.Tensor:
    """The group of every input, then of every output."""
    ins = torch.empty(partition.in_channels, dtype=torch.int64)
    outs = torch.empty(partition.out_channels, dtype=torch.int64)
    for group, (reads, writes) in enumerate(zip(partition.inputs, partition.outputs, strict=True)):
        ins[list(reads)] = group
        outs[list(writes)] = group
    return torch.cat((ins, outs))


def agreement(student: gc.Partition, teacher: gc.Partition) -> float:
    """The share of channels in the right group, whatever the groups are called.

    Every group of the teacher has one of the student's, of all ways to pair them the best; channels
    under a label that is nobody's count as wrong.
    """
    table = torch.zeros(student.groups, teacher.groups, dtype=torch.int64)
    table.index_put_((labels_of(student), labels_of(teacher)), torch.tensor(1), accumulate=True)
    best = max(
        sum(int(table[label, group]) for group, label in enumerate(pairing))
        for pairing in itertools.permutations(range(student.groups), teacher.groups)
    )
    return best / (teacher.in_channels + teacher.out_channels)


def random_teacher(partition: gc.Partition) -> torch.Tensor:
    """A dense 1×1 weight, zero off the mask, its rows of length one."""
    weight = partition.unpack(torch.randn(partition.entries, 1, 1))
    return functional.normalize(weight, dim=1)


def example(teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, teacher.shape[1], 4, 4)
    y = functional.conv2d(x, teacher)
    return x, y + NOISE * torch.randn_like(y)


def train(
    student: nn.Module, teacher: torch.Tensor, steps: int, groups: list[dict[str, Any]]
) -> None:
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    for _ in range(steps):
        x, y = example(teacher)
        loss = (student(x) - y).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error(student: nn.Module, teacher: torch.Tensor) -> float:
    """What is left of the output's variance, the noise left out."""
    x = torch.randn(256, teacher.shape[1], 4, 4)
    with torch.no_grad():
        y = functional.conv2d(x, teacher)
        return float((student(x) - y).square().mean() / y.square().mean())


def learn_flgc(teacher: torch.Tensor) -> gc.nn.FLGConv2d:
    outs, ins = teacher.shape[:2]
    student = gc.nn.FLGConv2d(ins, outs, 1, groups=LABELS, bias=False)
    weights, logits = gc.nn.parameter_groups(student, weight_decay=1.0)
    logits |= {"lr": 0.1, "weight_decay": 0.05}
    train(student, teacher, LEARNING, [weights, logits])
    student.freeze_structure()
    train(student, teacher, TUNING, [{"params": [student.weight]}])
    return student


def flgc(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    planted = gc.Partition.random(CHANNELS, CHANNELS, GROUPS, seed=seed, uneven=True)
    teacher = random_teacher(planted)
    students = [learn_flgc(teacher) for _ in range(STARTS)]
    errors = [error(student, teacher) for student in students]
    fitting = [at for at in range(STARTS) if errors[at] < 2 * min(errors)]
    kept = min(fitting, key=lambda at: students[at].partition().entries)
    fixed = gc.nn.PartitionedConv2d(CHANNELS, CHANNELS, 1, groups=GROUPS, bias=False)
    train(fixed, teacher, LEARNING + TUNING, [{"params": [fixed.weight]}])
    return {
        "seed": seed,
        "sizes": planted.sizes,
        "agreement": agreement(students[kept].partition(), planted),
        "starts": [agreement(student.partition(), planted) for student in students],
        "error": errors[kept],
        "connections": students[kept].partition().entries / planted.entries,
        "fixed_agreement": agreement(fixed.partition, planted),
        "fixed_error": error(fixed, teacher),
    }


def dgconv(seed: int) -> dict[str, Any]:
    """Gates found from all gates open, and from random ones."""
    torch.manual_seed(seed)
    count = len(gc.nn.DGConv2d(CHANNELS, CHANNELS, 1).radices)
    planted = torch.randint(0, 2, (count,)).tolist()
    teacher = random_teacher(gc.Partition.kronecker(planted, CHANNELS, CHANNELS))
    result: dict[str, Any] = {"seed": seed, "gates": planted}
    for start, gates in (("open", [1] * count), ("random", None)):
        student = gc.nn.DGConv2d(CHANNELS, CHANNELS, 1, bias=False, gates=gates)
        weights, gates_group = gc.nn.parameter_groups(student, weight_decay=0.0)
        gates_group |= {"lr": 0.01, "momentum": 0.0}
        train(student, teacher, LEARNING, [weights, gates_group])
        found = [int(gate >= 0) for gate in student.gates.tolist()]
        result[f"{start}_right"] = sum(a == b for a, b in zip(found, planted, strict=True)) / count
        result[f"{start}_error"] = error(student, teacher)
    return result
