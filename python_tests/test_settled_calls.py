"""A call like an earlier one goes straight to the operation: it must mean the same.

What decides is everything that the checks of the long way look at, so a call that differs in any
of it takes the long way again. And a weight is read anew by every call.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, PARTITIONS, needs_native
from torch import nn
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import groupconv_ext as gc
from groupconv_ext import Partition, _ops, functional
from groupconv_ext.backends import choice

pytestmark = needs_native

EVEN = Partition.random(6, 4, 2, seed=0)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same"},
    {"activation": "relu"},
    {"activation": "silu", "padding": 1, "backend": "native"},
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def operands(kernel: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 6, 7, 8), torch.randn(4, 3, kernel, kernel), torch.randn(4)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_second_call_is_like_the_first(
    settings: dict[str, Any], packed: bool, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = operands(kernel)
    weight = weight.flatten(0, 1) if packed else weight
    call = {"partition": EVEN} | settings
    first = gc.conv2d(x, weight, bias, **call)
    expected = gc.conv2d(x, weight, bias, **(call | {"backend": "reference"}))
    torch.testing.assert_close(first, expected)
    residual = torch.randn_like(first)
    added = gc.conv2d(x, weight, bias, residual=residual, **call)
    monkeypatch.setattr(functional, "_check_tensors", None)
    assert torch.equal(gc.conv2d(x, weight, bias, **call), first)
    assert torch.equal(gc.conv2d(x, weight, bias, residual=residual, **call), added)
    other = torch.randn(1, 6, 9, 5)  # the size of the image is no part of the kind
    again = gc.conv2d(other, weight, **call)
    monkeypatch.undo()
    expected = gc.conv2d(other, weight, **(call | {"backend": "reference"}))
    torch.testing.assert_close(again, expected)


def test_a_weight_in_another_layout_is_read_in_order() -> None:
    x, weight, bias = operands()
    expected = gc.conv2d(x, weight, bias, partition=EVEN)
    weight = weight.to(memory_format=torch.channels_last)
    for _ in range(2):
        assert torch.equal(gc.conv2d(x, weight, bias, partition=EVEN), expected)


def test_an_image_without_a_batch() -> None:
    x, weight, bias = operands()
    expected = gc.conv2d(x, weight, bias, partition=EVEN)[0]
    for _ in range(2):
        assert torch.equal(gc.conv2d(x[0], weight, bias, partition=EVEN), expected)


@pytest.mark.parametrize("stride", [True, 1.0, (1, True), (1.0, 1), [1.0, 1]])
def test_what_equals_a_number_is_not_taken_for_it(stride: Any) -> None:
    x, weight, _ = operands()
    for usual in (1, (1, 1)):
        gc.conv2d(x, weight, partition=EVEN, stride=usual)
    with pytest.raises(TypeError, match="expected an int"):
        gc.conv2d(x, weight, partition=EVEN, stride=stride)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_after_a_settled_call(
    settings: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = operands()
    weight = weight.flatten(0, 1) if packed else weight
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    call = {"partition": EVEN} | settings
    with torch.enable_grad():
        expected = gc.conv2d(*leaves, **(call | {"backend": "reference"}))
        residual = torch.randn_like(expected, requires_grad=True)
        expected = gc.conv2d(*leaves, residual=residual, **(call | {"backend": "reference"}))
        leaves.append(residual)
        by_expected = torch.autograd.grad(expected.square().sum(), leaves)
        gc.conv2d(x, weight, bias, **call)
        monkeypatch.setattr(functional, "_check_tensors", None)
        y = gc.conv2d(x, weight, bias, residual=residual, **call)
        for actual, wanted in zip(
            torch.autograd.grad(y.square().sum(), leaves), by_expected, strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, expected)
    assert not gc.conv2d(x, weight, bias, **call).requires_grad


def test_what_is_wrong_while_training_is_said_in_the_same_words() -> None:
    x, weight, bias = operands()
    with torch.enable_grad():
        gc.conv2d(x, weight.requires_grad_(), bias, partition=EVEN)
        with pytest.raises(ValueError, match="x has 5 channels; expected 6"):
            gc.conv2d(x[:, :5], weight, bias, partition=EVEN)
        with pytest.raises(TypeError, match="residual is 1; expected a tensor or None"):
            gc.conv2d(x, weight, bias, partition=EVEN, residual=1)


def test_autocast_after_a_settled_call() -> None:
    x, weight, _ = operands()
    gc.conv2d(x, weight, partition=EVEN)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert gc.conv2d(x, weight, partition=EVEN).dtype == torch.bfloat16
    assert gc.conv2d(x, weight, partition=EVEN).dtype == torch.float32


def test_forward_mode_after_a_settled_call() -> None:
    x, weight, _ = operands()
    y = gc.conv2d(x, weight, partition=EVEN)
    with torch.enable_grad():
        tangent = jvp(lambda x: gc.conv2d(x, weight, partition=EVEN), (x,), (x,))[1]
    torch.testing.assert_close(tangent, y)
    _, tangent = jvp(lambda x: gc.conv2d(x, weight, partition=EVEN), (x,), (x,))
    torch.testing.assert_close(tangent, y)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_after_a_settled_call(in_dims: tuple[int | None, int | None]) -> None:
    x, weight, _ = operands()
    xs, weights = torch.stack([x, x + 1]), torch.stack([weight, weight - 1])
    given = (x if in_dims[0] is None else xs, weight if in_dims[1] is None else weights)

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=EVEN)

    convolve(x, weight)
    expected = [
        convolve(
            given[0] if in_dims[0] is None else xs[i], weights[i] if in_dims[1] == 0 else weight
        )
        for i in range(2)
    ]
    torch.testing.assert_close(vmap(convolve, in_dims)(*given), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_after_a_settled_call(dtype: torch.dtype) -> None:
    x, weight, _ = operands()
    gc.conv2d(x, weight, partition=EVEN)
    x, weight = x.to(dtype), weight.to(dtype)
    for _ in range(2):
        assert gc.conv2d(x, weight, partition=EVEN).dtype == dtype


def test_auto_measures_again_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands()
    gc.conv2d(x, weight, partition=EVEN)
    asked = []

    def best(call: object, operands: object) -> Any:
        asked.append(call)
        return gc.backends.NATIVE

    monkeypatch.setattr(choice, "measured_devices", ("cpu", "cuda"))
    monkeypatch.setattr(functional, "best", best)
    for _ in range(2):
        gc.conv2d(x, weight, partition=EVEN)
    assert len(asked) == 2


def test_symbolic_sizes_after_a_settled_call() -> None:
    x, weight, _ = operands()

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gc.conv2d(x, weight, partition=EVEN)

    expected = convolve(x, weight)
    traced = make_fx(convolve, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, weight)
    torch.testing.assert_close(traced(x, weight), expected)


def test_memory_freed_after_a_settled_call() -> None:
    x, weight, _ = operands()
    gc.conv2d(x, weight, partition=EVEN)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="reaches beyond its memory"):
        gc.conv2d(x, weight, partition=EVEN)


def test_kinds_do_not_fill_the_memory() -> None:
    partition = Partition.contiguous(2, 2, 1)
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1)
    for padding in range(600):
        gc.conv2d(x, weight, partition=partition, stride=1000, padding=padding)
    assert 0 < len(partition.settled_calls) <= 256


# ---- the operation's weight of four dimensions --------------------------------------------------


def test_opcheck_with_a_weight_of_four_dimensions() -> None:
    x, weight, bias = operands()
    opcheck(
        torch.ops.groupconv.conv2d.default, (x, weight, bias, None, EVEN.cpu_table, 4, 2, 1, 1, 1)
    )


@pytest.mark.parametrize(
    ("partition", "weight"),
    [
        (EVEN, torch.ones(3, 4, 1, 1)),  # as many entries
        (EVEN, torch.ones(4, 6, 1, 1)),  # a dense one
        (PARTITIONS["ragged"], torch.ones(7, 3, 1, 1)),
        # As many entries as even groups would have: nobody can say which are whose.
        (Partition(4, 4, [[0, 1], [2, 3]], [[0, 1, 2], [3]]), torch.ones(4, 2, 1, 1)),
    ],
    ids=["transposed", "dense", "ragged", "uneven outputs"],
)
def test_a_weight_of_other_groups_is_refused(partition: Partition, weight: torch.Tensor) -> None:
    x = torch.ones(1, partition.in_channels, 2, 2)
    with pytest.raises(RuntimeError, match="must be that of even groups, "):
        _ops.bare_conv2d(x, weight, None, None, partition.cpu_table, partition.out_channels)


# ---- weights that change between two calls ------------------------------------------------------


def of_an_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def of_a_state_dict(weight: nn.Parameter) -> None:
    holder = nn.ParameterDict({"weight": weight})
    holder.load_state_dict({"weight": torch.randn_like(weight)})


def of_other_memory(weight: nn.Parameter) -> None:
    """At the address of the old one, as a rule."""
    size = weight.shape
    weight.data = torch.empty(0)
    weight.data = torch.randn(size)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(-2),
    "through data": lambda weight: weight.data.mul_(-2),  # which no version counts
    "through numpy": lambda weight: np.negative(weight.detach().numpy(), weight.detach().numpy()),
    "through a view": lambda weight: weight.view(-1)[1:].zero_(),
    "by an optimizer": of_an_optimizer,
    "by a state_dict": of_a_state_dict,
    "other memory": of_other_memory,
}
KINDS: dict[str, tuple[Partition, int]] = {
    "1×1": (Partition.random(64, 64, 4, seed=0), 1),
    "small groups": (Partition.contiguous(64, 64, 16), 3),
    "windows": (Partition.random(64, 64, 2, seed=0), 3),
    "channelwise": (Partition.random(64, 64, 64, seed=0), 3),
    "streamed": (Partition.random(512, 512, 1, seed=0), 3),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_is_what_it_is_now(change: str, kind: str, layout: str, mode: type) -> None:
    """Nothing of it is kept from call to call, so whoever changes it however is seen."""
    partition, window = KINDS[kind]
    side = 7 if kind == "streamed" else 14
    x = LAYOUTS[layout](torch.randn(1, partition.in_channels, side, side))
    weight = nn.Parameter(torch.randn(partition.entries, window, window))

    def call(weight: torch.Tensor) -> list[torch.Tensor]:
        with mode():
            source = x.clone().requires_grad_(torch.is_grad_enabled())
            y = gc.conv2d(source, weight, partition=partition, padding=window // 2)
            return [y, *torch.autograd.grad(y.sum(), source)] if y.requires_grad else [y]

    before = call(weight)
    call(weight)
    CHANGES[change](weight)
    after, fresh = call(weight), call(weight.detach().clone().requires_grad_())
    assert not torch.equal(after[0], before[0])
    assert all(map(torch.equal, after, fresh))
