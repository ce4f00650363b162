"""The contenders: a *method* (how to compute) and a *question* (what is asked of it).

Most are asked the problem itself. Some are asked it in the other layout, because a user may choose
the better one for a whole network. Two are asked an easier question, the contiguous even split of
the same size: they are bounds, not rivals, and marked so. A contender without a place beside a
problem says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groupconv_ext import _ops

from . import methods
from .methods import Case, Method
from .problems import Problem

Outputs = tuple[Tensor, ...]  # (y,) or (y, input gradient, weight gradient)


@dataclass(frozen=True)
class Contender:
    """A method and the question it is asked: data, and a predicate that answers with a reason."""

    name: str
    about: str
    method: Callable[[Case], Method]
    refuses: Callable[[Problem], str | None] = lambda problem: None
    question: Callable[[Problem], Problem] = lambda problem: problem
    same_function: bool = True

    def reason_against(self, problem: Problem) -> str | None:
        """Why this contender has no place beside ``problem``, or None."""
        question = self.question(problem)
        if not self.same_function and question == problem:
            return "the problem is the contiguous one itself"
        return self.refuses(question)

    def attempt(self, case: Case) -> Attempt:
        """The method made ready for one case, which must answer ``question(problem)``."""
        return Attempt(case, self.method(case))


class Attempt:
    """One contender on one case: ``run`` is what is timed."""

    def __init__(self, case: Case, method: Method) -> None:
        self._function = method.function
        self._to_packed = method.to_packed
        self._trains = case.problem.trains
        self._x = case.x.detach().requires_grad_(self._trains)
        self._weight = method.weight.detach().requires_grad_(self._trains)
        self._grad_output = case.grad_output

    def run(self) -> Outputs:
        """The output, and for training both gradients; call it in inference mode otherwise."""
        y = self._function(self._x, self._weight)
        if not self._trains:
            return (y,)
        gradients = torch.autograd.grad(y, (self._x, self._weight), self._grad_output)
        return y, *gradients

    def answer(self) -> Outputs:
        """What ``run`` gives, with the weight gradient packed: to be checked, not timed."""
        y, *gradients = self.run()
        if not gradients:
            return (y,)
        grad_x, grad_weight = gradients
        return y, grad_x, self._to_packed(grad_weight)


# ---- questions ---------------------------------------------------------------------------


def _other_layout(problem: Problem) -> Problem:
    return replace(problem, layout="NHWC" if problem.layout == "NCHW" else "NCHW")


def _channels_last(problem: Problem) -> Problem:
    return replace(problem, layout="NHWC")


def _contiguous(problem: Problem) -> Problem:
    """The even split of the same size in channel order; overlapping lists as if copied out."""
    reads = sum(n_in for _, n_in in problem.partition.sizes)
    return replace(problem, kind="contiguous", in_channels=reads)


# ---- reasons against -----------------------------------------------------------------------------

Refusal = Callable[[Problem], str | None]


def _first(*refusals: Refusal) -> Refusal:
    """The first reason that any of the predicates gives."""

    def refuses(problem: Problem) -> str | None:
        return next((reason for refuse in refusals if (reason := refuse(problem))), None)

    return refuses


def _not_built(problem: Problem) -> str | None:
    del problem
    return _ops.unavailable


def _corrupts_heap(problem: Problem) -> str | None:
    """A known bug of torch up to 2.15, kept away from in all its neighbourhood."""
    strided_pointwise = problem.kernel == 1 and problem.stride > 1
    if problem.trains and strided_pointwise and problem.layout == "NHWC":
        return "torch may corrupt the heap in this weight gradient (strided 1×1, channels_last)"
    return None


def _ragged(problem: Problem) -> str | None:
    return None if problem.partition.is_even else "groups are ragged: one grouped call cannot do it"


def _even(problem: Problem) -> str | None:
    return "groups are even: one grouped call does it" if problem.partition.is_even else None


def _inference(problem: Problem) -> str | None:
    return None if problem.trains else "the same as aten without a backward pass"


def _training(problem: Problem) -> str | None:
    return "the weight changes at every step" if problem.trains else None


def _no_onednn(problem: Problem) -> str | None:
    del problem
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return None if available else "this torch was built without oneDNN"


def _no_permutation(problem: Problem) -> str | None:
    p = problem.partition
    if p.has_overlap or sum(n_in for _, n_in in p.sizes) != p.in_channels:
        return "the input lists are not a permutation"
    return "no channel moves" if p.is_contiguous else None


def _no_shuffle(problem: Problem) -> str | None:
    if problem.kind in ("interleaved", "shuffled"):
        return None
    return f"{problem.kind} groups are not a shuffle"


_MOST_CALLS = 64
_LARGEST_DENSE = 16


def _many_groups(problem: Problem) -> str | None:
    too_many = problem.groups > _MOST_CALLS
    return f"{problem.groups} convolutions are never the best way" if too_many else None


def _wasteful(problem: Problem) -> str | None:
    p = problem.partition
    waste = p.in_channels * p.out_channels / p.entries
    return f"a dense kernel does {waste:.0f}× the work" if waste > _LARGEST_DENSE else None


# ---- all of them --------------------------------------------------------------------------------

OURS = "native"

_ALL = (
    Contender(OURS, "groupconv_ext, native kernels", methods.native, _not_built),
    Contender(
        "aten",
        "index_select, F.conv2d(groups=G), index_select, where a channel moves",
        methods.aten,
        _first(_ragged, _corrupts_heap),
    ),
    Contender(
        "aten-other-layout",
        "aten with input and output in the other layout",
        methods.aten,
        _first(_ragged, _corrupts_heap),
        question=_other_layout,
    ),
    Contender(
        "aten-inverse",
        "aten with a hand-written gradient that gathers where autograd would scatter-add",
        methods.aten_inverse,
        _first(_ragged, _inference, _no_permutation, _corrupts_heap),
    ),
    Contender(
        "prepacked",
        "aten in channels_last on a weight that oneDNN reordered beforehand, as a compiled and "
        "frozen model calls it",
        methods.prepacked,
        _first(_ragged, _training, _no_onednn),
        question=_channels_last,
    ),
    Contender(
        "channel-shuffle",
        "view, transpose, reshape around F.conv2d(groups=G)",
        methods.shuffle,
        _first(_no_shuffle, _corrupts_heap),
    ),
    Contender(
        "padded",
        "every group padded to the largest with zero weights, one F.conv2d(groups=G)",
        methods.padded,
        _first(_even, _corrupts_heap),
    ),
    Contender(
        "per-group",
        "one F.conv2d a group, then cat and index_select",
        methods.per_group,
        _first(_even, _many_groups, _corrupts_heap),
    ),
    Contender(
        "dense",
        "F.conv2d with a masked dense weight, through the vendor library",
        methods.dense,
        _first(_wasteful, _corrupts_heap),
    ),
    Contender(
        "dense-other-layout",
        "dense with input and output in the other layout",
        methods.dense,
        _first(_wasteful, _corrupts_heap),
        question=_other_layout,
    ),
    Contender(
        "aten-contiguous",
        "F.conv2d(groups=G) on the contiguous even split of the same size: permutation left out",
        methods.aten,
        _corrupts_heap,
        question=_contiguous,
        same_function=False,
    ),
    Contender(
        "native-contiguous",
        "our kernels on the contiguous even split of the same size: what a permutation costs us",
        methods.native,
        _not_built,
        question=_contiguous,
        same_function=False,
    ),
)

CONTENDERS: Mapping[str, Contender] = {contender.name: contender for contender in _ALL}
