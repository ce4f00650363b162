"""The one idea of this library: a Partition.

A convolution whose channels are split into groups is described completely by saying, for every
group, **which input channels it reads and which output channels it writes**. With 6 inputs and 3
outputs, for example::

                                               connections, outputs × inputs
    group A reads (0, 3, 4), writes (1, 2)     0   . B B . . B
    group B reads (1, 2, 5), writes (0,)       1   A . . A A .
                                               2   A . . A A .

That pair of lists is a :class:`Partition`. The output lists are disjoint and cover all output
channels; the input lists may be uneven, empty, overlap, or leave channels out. Nothing else is
asked of them, and that is enough for every published method:

===========================================  ==================================================
standard groups (``nn.Conv2d(groups=G)``)    :meth:`Partition.contiguous`
grouped convolution, then a channel shuffle  :meth:`Partition.shuffled`
IGC's secondary groups                       :meth:`Partition.interleaved`
FLGC: a learned label for every channel      :meth:`Partition.from_labels`
DGConv: a Kronecker product of 0/1 gates     :meth:`Partition.kronecker`
CondenseNet's index layers, anything else    :meth:`Partition.from_lists`
===========================================  ==================================================

So there is one convolution to make fast, and a method is a way of learning or choosing a
Partition.

The weight of a partitioned convolution is **packed**: ``[entries, *kernel]``, group after group,
each group's block ``[outputs of the group, inputs of the group]`` row-major, in the order of its
lists. For even groups that is exactly the memory of ``nn.Conv2d(groups=G).weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.compiler import is_compiling
from torch.utils._pytree import register_constant

from . import _checks
from ._checks import IndexArray, Integers
from ._per_device import PerDevice

__all__ = ["Partition", "kronecker_radices"]

Device: TypeAlias = torch.device | str | int
Derivation: TypeAlias = Callable[..., npt.NDArray[np.signedinteger]]


class Settled(dict[tuple[Hashable, ...], tuple[Any, ...]]):
    """For kinds of calls what follows from the kind alone; bounded."""

    def add(self, kind: tuple[Hashable, ...], what: tuple[Any, ...]) -> None:
        """Keep it; a program has few kinds, a search over settings must not fill the memory."""
        if len(self) >= _MOST_SETTLED:
            self.clear()
        self[kind] = what


_MOST_SETTLED = 256


class Partition:
    """For every group, the input channels it reads and the output channels it writes.

    Immutable. The order of the groups and of the channels inside a group is significant: it is
    the order of the packed weight. A group without inputs writes the bias alone, a group without
    outputs writes nothing.

    Attributes:
        in_channels: Number of channels of the input, read or not.
        out_channels: Number of channels of the output.
        inputs: For every group the input channels it reads, each at most once.
        outputs: For every group the output channels it writes; disjoint, all channels covered.
        groups: Number of groups, empty ones included.
        sizes: ``(outputs, inputs)`` counted for every group.
        widest: The most outputs that a group has, and the most inputs.
        entries: Σ outputs · inputs over the groups: the length of a packed weight.
        is_even: Every group has the same size, as in ``nn.Conv2d(groups=G)``.
        is_contiguous: The lists, one after another, count 0, 1, 2, … on both sides, so no channel
            moves; with ``is_even`` this *is* ``nn.Conv2d(groups=G)``.
        has_overlap: Some input channel is read by more than one group.
        reads_all: Every input channel is read by some group.
        cpu_table: :meth:`table` on the CPU.
        settled_calls: What the kernel is given, for every kind of call that was seen and checked.
    """

    in_channels: int
    out_channels: int
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    groups: int
    sizes: tuple[tuple[int, int], ...]
    widest: tuple[int, int]
    entries: int
    is_even: bool
    is_contiguous: bool
    has_overlap: bool
    reads_all: bool
    cpu_table: torch.Tensor
    settled_calls: Settled
    _unread: int
    _table: PerDevice
    _entry_positions: PerDevice
    _read_order: PerDevice
    _write_order: PerDevice

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        inputs: Sequence[Integers],
        outputs: Sequence[Integers],
    ) -> None:
        """Validate the lists; every constructor ends here."""
        in_channels = _checks.count("in_channels", in_channels)
        out_channels = _checks.count("out_channels", out_channels)
        groups = _checks.groups(inputs, outputs)
        reads, read_offsets = _checks.concatenate("inputs", inputs)
        writes, write_offsets = _checks.concatenate("outputs", outputs)
        _checks.check_range("inputs", reads, read_offsets, "in_channels", in_channels)
        _checks.check_range("outputs", writes, write_offsets, "out_channels", out_channels)
        _checks.check_no_repeats(reads, read_offsets, in_channels)
        _checks.check_cover(writes, out_channels)

        input_lists, output_lists = _split(reads, read_offsets), _split(writes, write_offsets)
        sizes = tuple(
            (len(out), len(ins)) for out, ins in zip(output_lists, input_lists, strict=True)
        )
        distinct_reads = len(np.unique(reads))
        header = [in_channels, out_channels, groups, len(reads)]
        flat = np.concatenate([header, read_offsets, write_offsets, reads, writes])
        table = PerDevice(lambda: flat.astype(np.int32))
        # Straight into the instance, because __setattr__ refuses.
        vars(self).update(
            in_channels=in_channels,
            out_channels=out_channels,
            inputs=input_lists,
            outputs=output_lists,
            groups=groups,
            sizes=sizes,
            widest=(max(out for out, _ in sizes), max(ins for _, ins in sizes)),
            entries=sum(out * ins for out, ins in sizes),
            is_even=len(set(sizes)) == 1,
            is_contiguous=_counts_up(reads, in_channels) and _counts_up(writes, out_channels),
            has_overlap=distinct_reads < len(reads),
            reads_all=distinct_reads == in_channels,
            cpu_table=table.on(torch.device("cpu")),
            settled_calls=Settled(),
            _unread=in_channels - distinct_reads,
            _table=table,
            _entry_positions=PerDevice(
                lambda: _entry_positions(input_lists, output_lists, in_channels)
            ),
            _read_order=PerDevice(reads.copy),
            _write_order=PerDevice(lambda: np.argsort(writes)),
        )

    # ---- the ways of choosing one -------------------------------------------------------------

    @classmethod
    def contiguous(cls, in_channels: int, out_channels: int, groups: int) -> Partition:
        """``nn.Conv2d``'s groups: consecutive channels, equally many in each group."""
        ins, outs = _checks.even_sizes(in_channels, out_channels, groups)
        return cls(in_channels, out_channels, _runs(ins, groups), _runs(outs, groups))

    @classmethod
    def interleaved(cls, in_channels: int, out_channels: int, groups: int) -> Partition:
        """Channels c, c+G, c+2G, … share a group, on both sides (IGC's secondary groups)."""
        _checks.even_sizes(in_channels, out_channels, groups)
        return cls(
            in_channels,
            out_channels,
            _strides(in_channels, groups),
            _strides(out_channels, groups),
        )

    @classmethod
    def shuffled(cls, in_channels: int, out_channels: int, groups: int) -> Partition:
        """A grouped convolution and ShuffleNet's channel shuffle after it, as one Partition.

        Inputs are contiguous; the i-th output of group g is channel ``i * groups + g``.
        """
        ins, _ = _checks.even_sizes(in_channels, out_channels, groups)
        return cls(in_channels, out_channels, _runs(ins, groups), _strides(out_channels, groups))

    @classmethod
    def from_labels(cls, in_labels: Integers, out_labels: Integers, groups: int) -> Partition:
        """One group label for every channel, as FLGC learns them; channels ascend in a group.

        Labels lie in ``[0, groups)``. Groups may be uneven, and a label nobody has is an empty
        group.
        """
        groups = _checks.count("groups", groups)
        ins = _checks.labels("in_labels", in_labels, groups)
        outs = _checks.labels("out_labels", out_labels, groups)
        return cls(len(ins), len(outs), _by_label(ins, groups), _by_label(outs, groups))

    @classmethod
    def from_lists(
        cls,
        inputs: Sequence[Integers],
        outputs: Sequence[Integers],
        *,
        in_channels: int,
        out_channels: int,
    ) -> Partition:
        """The lists themselves: anything goes that a Partition can be."""
        return cls(in_channels, out_channels, inputs, outputs)

    @classmethod
    def kronecker(cls, gates: Integers, in_channels: int, out_channels: int) -> Partition:
        """DGConv's mask U = U₁ ⊗ … ⊗ U_K, with U_k = g_k·**1** + (1 − g_k)·**I** (DGConv eq. 4).

        There is one gate, 0 or 1, for every prime factor p_k of ``gcd(in_channels,
        out_channels)``, repeated factors counted, and U_k is p_k × p_k. The factors stand in
        ascending order, and **the first has the largest stride**: for 12 channels they are
        (2, 2, 3), where gate 0 decides whether the two halves of the channels see each other, and
        gate 2 whether neighbours c, c+1, c+2 do. See :func:`kronecker_radices`.

        What remains of the channels, ``out_channels / gcd`` × ``in_channels / gcd``, is a block of
        ones with the smallest stride.

        Two channels are connected when their digits agree at every zero gate; those digits, read
        as a number, are therefore the label of a channel's group.
        """
        radices = kronecker_radices(in_channels, out_channels)
        bits = _checks.gates(gates, radices)
        return cls.from_labels(
            _digits_at_zero_gates(in_channels, radices, bits),
            _digits_at_zero_gates(out_channels, radices, bits),
            math.prod(radix for radix, bit in zip(radices, bits, strict=True) if not bit),
        )

    @classmethod
    def random(
        cls, in_channels: int, out_channels: int, groups: int, *, seed: int, uneven: bool = False
    ) -> Partition:
        """Labels drawn at random: even groups, or with ``uneven`` each channel on its own.

        Uneven groups of few channels may come out empty, as they do when groups are learned.
        """
        rng = np.random.default_rng(seed)
        if uneven:
            in_channels = _checks.count("in_channels", in_channels)
            out_channels = _checks.count("out_channels", out_channels)
            groups = _checks.count("groups", groups)
            in_labels = rng.integers(groups, size=in_channels)
            out_labels = rng.integers(groups, size=out_channels)
        else:
            ins, outs = _checks.even_sizes(in_channels, out_channels, groups)
            in_labels = rng.permutation(np.arange(in_channels) // ins)
            out_labels = rng.permutation(np.arange(out_channels) // outs)
        return cls.from_labels(in_labels, out_labels, groups)

    def permute_inputs(self, order: Integers) -> Partition:
        """Absorb ``x.index_select(1, order)`` standing **before** the convolution.

        Convolving ``x`` with the result, and the same packed weight, equals convolving
        ``x.index_select(1, order)`` with this one.
        """
        order = _checks.permutation("order", order, self.in_channels)
        moved = [order[list(group)].tolist() for group in self.inputs]
        return Partition(self.in_channels, self.out_channels, moved, self.outputs)

    def permute_outputs(self, order: Integers) -> Partition:
        """Absorb ``y.index_select(1, order)`` standing **after** the convolution.

        The result, with the same packed weight and with ``bias[order]``, gives this one's output
        ``y`` as ``y.index_select(1, order)``.
        """
        position = np.argsort(_checks.permutation("order", order, self.out_channels))
        moved = [position[list(group)].tolist() for group in self.outputs]
        return Partition(self.in_channels, self.out_channels, self.inputs, moved)

    # ---- what weights need --------------------------------------------------------------------

    def mask(self, dtype: torch.dtype = torch.bool, device: Device | None = None) -> torch.Tensor:
        """``[out_channels, in_channels]``, one where a connection exists and zero elsewhere."""
        flat = torch.zeros(self.out_channels * self.in_channels, dtype=dtype, device=device)
        flat.index_fill_(0, _constant(self, "_entry_positions", flat.device), 1)
        return flat.view(self.out_channels, self.in_channels)

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """``[out_channels, in_channels, *kernel]`` → ``[entries, *kernel]``; differentiable."""
        if dense.shape[:2] != (self.out_channels, self.in_channels):
            raise ValueError(
                f"dense weight has shape {list(dense.shape)}; expected "
                f"[{self.out_channels}, {self.in_channels}, *kernel] for {self}"
            )
        return dense.flatten(0, 1).index_select(
            0, _constant(self, "_entry_positions", dense.device)
        )

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """``[entries, *kernel]`` → ``[out_channels, in_channels, *kernel]``, zero off the mask.

        Differentiable. Even groups may also come as ``nn.Conv2d`` has them,
        ``[out_channels, inputs of a group, *kernel]``, rows in group order. Where both readings
        fit, as they may with one input a group, a tensor of four dimensions is read as
        ``nn.Conv2d``'s and one of fewer as packed.
        """
        _, ins = self.sizes[0]
        grouped = self.is_even and packed.shape[:2] == (self.out_channels, ins)
        if grouped and (ins != 1 or packed.dim() >= 4):
            packed = packed.flatten(0, 1)
        elif packed.shape[:1] != (self.entries,):
            also = f" or [{self.out_channels}, {ins}, *kernel]" if self.is_even else ""
            raise ValueError(
                f"packed weight has shape {list(packed.shape)}; expected "
                f"[{self.entries}, *kernel]{also} for {self}"
            )
        kernel = packed.shape[1:]
        dense = packed.new_zeros(self.out_channels * self.in_channels, *kernel)
        dense = dense.index_copy(0, _constant(self, "_entry_positions", packed.device), packed)
        return dense.view(self.out_channels, self.in_channels, *kernel)

    def table(self, device: Device) -> torch.Tensor:
        """The Partition as the kernels read it: a flat int32 tensor, cached for every device.

        ``[in_channels, out_channels, groups, reads]``, then where each group's list starts and
        the last one ends, ``in_offsets[groups + 1]`` and ``out_offsets[groups + 1]``, then the
        lists one after another, ``inputs[reads]`` and ``outputs[out_channels]``.
        """
        device = torch.device(device)
        return self.cpu_table if device.type == "cpu" else _constant(self, "_table", device)

    @classmethod
    def from_table(cls, table: Integers) -> Partition:
        """The Partition that a :meth:`table` describes, as a checkpoint holds it."""
        in_channels, out_channels, reads, read_offsets, writes, write_offsets = _checks.table(table)
        return cls(
            in_channels, out_channels, _split(reads, read_offsets), _split(writes, write_offsets)
        )

    def read_order(self, device: Device) -> torch.Tensor:
        """All input lists one after another: the gather before a standard grouped convolution."""
        return _constant(self, "_read_order", torch.device(device))

    def write_order(self, device: Device) -> torch.Tensor:
        """Where each output channel stands in group order: the gather after one."""
        return _constant(self, "_write_order", torch.device(device))

    def derived(self, make: Derivation, *settings: int, device: Device) -> torch.Tensor:
        """What ``make(self, *settings)`` returns as a tensor on ``device``, made once and kept.

        For kernels that want this partition in a form of their own; ``make`` is a function of a
        module, known by its name.
        """
        name = "_".join(("", make.__name__, *map(str, settings)))
        _keep(self, name, make, settings)
        return _constant(self, name, torch.device(device))

    # ---- a value like a tuple -----------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name!r}: a Partition is immutable")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name!r}: a Partition is immutable")

    def _fields(self) -> tuple[object, ...]:
        return self.in_channels, self.out_channels, self.inputs, self.outputs

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def __reduce__(self) -> tuple[type[Partition], tuple[object, ...]]:
        return Partition, self._fields()

    def __repr__(self) -> str:
        sizes = [f"{outs}×{ins}" for outs, ins in self.sizes[:8]]
        if self.is_even:
            sizes = ["even", sizes[0]]
        else:
            sizes = ["ragged", *sizes, *(["…"] if self.groups > len(sizes) else [])]
        reads, writes = chain.from_iterable(self.inputs), chain.from_iterable(self.outputs)
        permuted = not _ascends(writes) or not (self.has_overlap or _ascends(reads))
        notes = {
            "overlapping inputs": self.has_overlap,
            f"{self._unread} unread": self._unread > 0,
            "permuted": permuted,
        }
        parts = [
            f"{self.in_channels}→{self.out_channels}",
            f"{self.groups} group{'s' if self.groups > 1 else ''}",
            " ".join(sizes),
            *(note for note, holds in notes.items() if holds),
        ]
        return f"Partition({', '.join(parts)})"


# A Partition never changes, and torch.compile may know: it compiles anew for one that is not equal.
register_constant(Partition)


def _prepare(partition: Partition, name: str, device: torch.device) -> bool:
    """Make an index tensor while ``torch.compile`` traces, outside of what it traces."""
    tensors: PerDevice = getattr(partition, name)
    return tensors.on(device).device == device


def _keep(partition: Partition, name: str, make: Derivation, settings: tuple[int, ...]) -> None:
    """Give ``partition`` an index tensor for each device under ``name``, if it has none yet."""
    if name not in vars(partition):
        vars(partition)[name] = PerDevice(lambda: make(partition, *settings))


# What torch.compiler.assume_constant_result does, which would import the compiler, for seconds.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
_keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _constant(partition: Partition, name: str, device: torch.device) -> torch.Tensor:
    """An index tensor of ``partition`` on ``device``; a constant to ``torch.compile`` as well.

    To the compiler it is an attribute of this partition. A function that returned it would give all
    partitions of a graph one name for their tensors, which the compiler refuses.
    """
    tensors: PerDevice = getattr(partition, name)
    if is_compiling():
        _prepare(partition, name, device)
        kept = tensors.kept(device)
        if kept is not None:
            return kept
    return tensors.on(device)


def kronecker_radices(in_channels: int, out_channels: int) -> tuple[int, ...]:
    """The factor p_k of every gate of :meth:`Partition.kronecker`, largest stride first.

    They are the prime factors of ``gcd(in_channels, out_channels)`` in ascending order, repeated
    ones counted: ``(2, 2, 3)`` for 12 and 24 channels, ``()`` for 5 and 8.
    """
    rest = math.gcd(
        _checks.count("in_channels", in_channels), _checks.count("out_channels", out_channels)
    )
    radices = []
    radix = 2
    while radix * radix <= rest:
        while rest % radix == 0:
            radices.append(radix)
            rest //= radix
        radix += 1
    return (*radices, rest) if rest > 1 else tuple(radices)


def _digits_at_zero_gates(channels: int, radices: Sequence[int], bits: Sequence[int]) -> IndexArray:
    """Each channel's digits where the gate is zero, read as one mixed-radix number."""
    label = np.zeros(channels, np.int64)
    stride = channels
    for radix, bit in zip(radices, bits, strict=True):
        stride //= radix
        if not bit:
            label = label * radix + np.arange(channels) // stride % radix
    return label


# ---- how lists of channels are made ------------------------------------------------------------


def _runs(size: int, groups: int) -> list[range]:
    return [range(group * size, (group + 1) * size) for group in range(groups)]


def _strides(channels: int, groups: int) -> list[range]:
    return [range(group, channels, groups) for group in range(groups)]


def _by_label(labels: IndexArray, groups: int) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(labels, kind="stable")
    return _split(order, np.searchsorted(labels[order], np.arange(groups + 1)))


def _split(values: IndexArray, offsets: IndexArray) -> tuple[tuple[int, ...], ...]:
    flat = values.tolist()
    return tuple(tuple(flat[start:stop]) for start, stop in pairwise(offsets.tolist()))


def _counts_up(channels: IndexArray, stop: int) -> bool:
    return len(channels) == stop and np.array_equal(channels, np.arange(stop))


def _ascends(values: Iterable[int]) -> bool:
    return all(before < after for before, after in pairwise(values))


def _entry_positions(
    inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], in_channels: int
) -> IndexArray:
    """For every entry of a packed weight its place in the flattened dense one."""
    blocks = [
        np.add.outer(np.array(outs, np.int64) * in_channels, np.array(ins, np.int64)).ravel()
        for outs, ins in zip(outputs, inputs, strict=True)
    ]
    return np.concatenate(blocks)
