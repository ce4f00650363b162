"""Every contender's answer against the reference in float64, before anything is timed.

A sum of K products of independent values carries a rounding error that grows like √K: u√K times
the size of the result, u being half the dtype's epsilon. The bound is four times that, with the
largest expected value as the size. A single missing or doubled product is about 1/√K of a result,
orders of magnitude outside it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import sqrt

import torch

from groupconv_ext import reference

from .methods import Case
from .problems import Problem
from .rivals import Outputs

_NAMES = ("output", "input gradient", "weight gradient")
_MARGIN = 4.0


class WrongAnswerError(AssertionError):
    """A contender computed something else; its time would mean nothing."""


@dataclass(frozen=True)
class Oracle:
    """The right answer to a case, and how far from it rounding may lead."""

    expected: Outputs
    bounds: tuple[float, ...]

    @classmethod
    def of(cls, case: Case) -> Oracle:
        """Compute the answer in float64 from the very values that the contenders get."""
        problem, partition = case.problem, case.partition
        stride = (problem.stride,) * 2
        padding = (problem.padding,) * 4
        x, weight, grad = case.x.double(), case.weight.double(), case.grad_output.double()
        expected: Outputs = (reference.conv2d(x, weight, None, partition, stride, padding),)
        if problem.trains:
            size, kernel = (problem.height, problem.width), (problem.kernel,) * 2
            expected += (
                reference.conv2d_input_grad(grad, weight, partition, size, stride, padding),
                reference.conv2d_weight_grad(grad, x, partition, kernel, stride, padding),
            )
        unit = torch.finfo(problem.torch_dtype).eps / 2
        lengths = accumulation_lengths(problem)
        return cls(
            expected,
            tuple(
                _MARGIN * unit * sqrt(length) * float(value.abs().max())
                for length, value in zip(lengths, expected, strict=False)
            ),
        )

    def check(self, answer: Outputs) -> float:
        """The largest error as a share of its bound; raises WrongAnswerError beyond it."""
        worst = 0.0
        for name, got, expected, bound in zip(
            _NAMES, answer, self.expected, self.bounds, strict=False
        ):
            if got.shape != expected.shape:
                raise WrongAnswerError(
                    f"{name} has shape {list(got.shape)}, expected {list(expected.shape)}"
                )
            error = float((got.detach().double() - expected).abs().max())
            if not error <= bound:  # NaN fails too
                raise WrongAnswerError(
                    f"{name} is off by {error:.3g}; rounding explains at most {bound:.3g}"
                )
            worst = max(worst, error / bound if bound else 0.0)
        return worst


def accumulation_lengths(problem: Problem) -> tuple[int, int, int]:
    """The longest sums behind an output, an input gradient and a weight gradient."""
    partition = problem.partition
    taps = problem.kernel**2
    readers: Counter[int] = Counter()
    for inputs, (n_out, _) in zip(partition.inputs, partition.sizes, strict=True):
        readers.update(dict.fromkeys(inputs, n_out))
    out_height, out_width = problem.output_size
    return (
        taps * max(n_in for _, n_in in partition.sizes),
        taps * max(readers.values()),
        problem.batch * out_height * out_width,
    )
