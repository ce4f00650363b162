"""FLGC and DGConv as functions: checked arguments, autocast, and the choice between two ways.

``native`` and ``triton`` compute the blocks that are selected, as :mod:`groupconv_ext.masked` does.
``dense`` multiplies the weight by its mask and convolves densely in plain PyTorch, on every device
and dtype. ``auto`` takes ``native`` on the CPU in float32, float64 and bfloat16, else ``dense``: no
kernel for a GPU was ever timed, so they have to be asked for by name. On CUDA ``native`` does not
wait to look at logits or gates: where they are not finite, the result is NaN.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import reference
from .backends import BackendError, Call
from .backends.native import NATIVE
from .backends.triton import TRITON, TRITON_LABELLED, load
from .backends.vendor import grouped_conv2d
from .masked import dgconv_convolve, flgc_convolve, labelled_weight, mask_kronecker, pack
from .operations import NATIVE_LABELLED, LabelledOperations
from .partition import Partition, kronecker_radices
from .window import IntOrPair, Padding, make_window

__all__ = [
    "dgconv_conv2d",
    "dgconv_partition",
    "dgconv_weight",
    "flgc_conv2d",
    "flgc_partition",
    "flgc_weight",
    "packed_weight",
]

GRADIENTS = ("straight_through", "winner")
WEIGHT_GRADIENTS = ("straight_through", "masked")
BACKENDS = ("auto", "native", "triton", "dense")
_LABELLED = (("native", NATIVE, NATIVE_LABELLED), ("triton", TRITON, TRITON_LABELLED))


def check_option(name: str, value: object, expected: tuple[str, ...]) -> None:
    """An option that is one of a few words."""
    if value not in expected:
        raise ValueError(f"{name} is {value!r}; expected one of {expected}")


def check_tensor(x: object) -> None:
    """An image is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {x!r}; expected a tensor")


# ---- FLGC ---------------------------------------------------------------------------------------


def flgc_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    gradient: str = "straight_through",
    weight_gradient: str = "straight_through",
    learn: bool = True,
    backend: str = "auto",
    owner: str = "flgc_conv2d",
) -> torch.Tensor:
    """``conv2d(x, W ⊙ (T Sᵀ)) + bias`` (FLGC eq. 14), computing the selected blocks only.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``.
        weight: Dense, ``[N, C, kh, kw]``.
        bias: ``[N]``.
        input_logits: ``[C, G]``; the largest entry of a row, the first among equals, is the
            channel's group.
        output_logits: ``[N, G]``.
        stride: As in ``F.conv2d``, and so are ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        gradient: What reaches the logits: the derivative of every softmax entry of the row
            (``"straight_through"``, eq. 17 and 18) or of the winning one (``"winner"``).
        weight_gradient: ``"straight_through"`` (eq. 16: also where the mask is zero) or
            ``"masked"``.
        learn: Without it the logits get no gradient, the weight one where the mask is one, and
            no dense work is left.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"dense"``.
        owner: Who is named where a logit is NaN or infinite.

    Raises:
        ValueError: Shapes or values that do not fit, logits that are not finite.
        TypeError: Dtypes that do not fit.
    """
    check_option("gradient", gradient, GRADIENTS)
    check_option("weight_gradient", weight_gradient, WEIGHT_GRADIENTS)
    _check_logits(weight, input_logits, output_logits)
    x, bias, batched = _operands(x, weight, bias)
    window = make_window(weight.shape[2], weight.shape[3], stride, padding, dilation)
    if operations := _kernels(backend, x, input_logits, output_logits):
        in_labels = _row_labels(operations, input_logits, f"{owner}.input_logits")
        out_labels = _row_labels(operations, output_logits, f"{owner}.output_logits")
        y = flgc_convolve(
            x,
            weight,
            bias,
            input_logits,
            output_logits,
            in_labels,
            out_labels,
            window,
            gradient == "winner",
            weight_gradient == "masked",
            learn,
            operations,
        )
    else:
        _check_finite(f"{owner}.input_logits", input_logits)
        _check_finite(f"{owner}.output_logits", output_logits)
        if not learn:
            input_logits, output_logits = input_logits.detach(), output_logits.detach()
            weight_gradient = "masked"
        product = reference.flgc_weight(
            weight, input_logits, output_logits, gradient, weight_gradient
        )
        y = grouped_conv2d(x, product.to(x.dtype), bias, window, 1)
    return y if batched else y.squeeze(0)


def flgc_weight(
    weight: torch.Tensor,
    input_logits: torch.Tensor,
    output_logits: torch.Tensor,
    *,
    gradient: str = "straight_through",
    weight_gradient: str = "straight_through",
    backend: str = "auto",
) -> torch.Tensor:
    """``W ⊙ (T Sᵀ)`` (FLGC eq. 14), dense, for a weight ``[N, C, *kernel]``; see `flgc_conv2d`."""
    check_option("gradient", gradient, GRADIENTS)
    check_option("weight_gradient", weight_gradient, WEIGHT_GRADIENTS)
    _check_logits(weight, input_logits, output_logits)
    operations = _kernels(backend, weight, input_logits, output_logits)
    if operations is None:
        _check_finite("input_logits", input_logits)
        _check_finite("output_logits", output_logits)
        return reference.flgc_weight(weight, input_logits, output_logits, gradient, weight_gradient)
    return labelled_weight(
        weight,
        input_logits,
        output_logits,
        _row_labels(operations, input_logits, "input_logits"),
        _row_labels(operations, output_logits, "output_logits"),
        gradient == "winner",
        weight_gradient == "masked",
        operations,
    )


def flgc_partition(
    input_logits: torch.Tensor, output_logits: torch.Tensor, owner: str = "flgc_partition"
) -> Partition:
    """The groups that the logits choose now (FLGC Fig. 2)."""
    labels = []
    for name, logits in (("input_logits", input_logits), ("output_logits", output_logits)):
        _check_finite(f"{owner}.{name}", logits)
        labels.append(logits.detach().argmax(1).cpu())
    return Partition.from_labels(labels[0], labels[1], input_logits.shape[1])


# ---- DGConv -------------------------------------------------------------------------------------


def dgconv_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: torch.Tensor,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    backend: str = "auto",
    owner: str = "dgconv_conv2d",
) -> torch.Tensor:
    """``conv2d(x, W ⊙ U) + bias`` (DGConv eq. 3, 4), computing the selected blocks only.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``.
        weight: Dense, ``[N, C, kh, kw]``.
        bias: ``[N]``.
        gates: One number for every prime factor of gcd(C, N), see :func:`kronecker_radices`; the
            gate is one where it is not negative, and passes its gradient on unchanged.
        stride: As in ``F.conv2d``, and so are ``padding`` and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"dense"``.
        owner: Who is named where a gate is NaN or infinite.

    Raises:
        ValueError: Shapes or values that do not fit, gates that are not finite.
        TypeError: Dtypes that do not fit.
    """
    _check_gates(weight, gates)
    x, bias, batched = _operands(x, weight, bias)
    window = make_window(weight.shape[2], weight.shape[3], stride, padding, dilation)
    if operations := _kernels(backend, x, gates):
        labels = _gate_labels(operations, weight, gates, owner)
        y = dgconv_convolve(x, weight, bias, gates, *labels, window, operations)
    else:
        _check_finite(f"{owner}.gates", gates)
        y = grouped_conv2d(x, reference.dgconv_weight(weight, gates).to(x.dtype), bias, window, 1)
    return y if batched else y.squeeze(0)


def dgconv_weight(
    weight: torch.Tensor, gates: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """``W ⊙ U`` (DGConv eq. 3, 4), dense, for a weight ``[N, C, *kernel]``; see `dgconv_conv2d`."""
    _check_gates(weight, gates)
    operations = _kernels(backend, weight, gates)
    if operations is None:
        _check_finite("gates", gates)
        return reference.dgconv_weight(weight, gates)
    in_labels, out_labels, _ = _gate_labels(operations, weight, gates, "dgconv_weight")
    return mask_kronecker(weight, gates, in_labels, out_labels, operations)


def dgconv_partition(
    gates: torch.Tensor, in_channels: int, out_channels: int, owner: str = "dgconv_partition"
) -> Partition:
    """The groups that the gates choose now."""
    _check_finite(f"{owner}.gates", gates)
    bits = (gates.detach() >= 0).to(torch.int64)
    return Partition.kronecker(bits.cpu(), in_channels, out_channels)


# ---- once the groups stay ------------------------------------------------------------------------


def packed_weight(
    weight: torch.Tensor, partition: Partition, x: torch.Tensor, backend: str
) -> torch.Tensor:
    """The selected blocks of a dense weight, cast on the way where autocast will want it so."""
    if _kernels(backend, weight) is not NATIVE_LABELLED:
        return partition.pack(weight)
    dtype = None
    if x.is_cpu and torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32:
        dtype = torch.get_autocast_dtype("cpu")
    return pack(weight, partition, dtype if dtype == torch.bfloat16 else None)


# ---- what both need -----------------------------------------------------------------------------


def _kernels(backend: str, *operands: torch.Tensor) -> LabelledOperations | None:
    """The kernels that compute the selected blocks, or ``None``: densely, in plain PyTorch."""
    check_option("backend", backend, BACKENDS)
    in_forward_mode = forward_ad._current_level >= 0
    on_cpu = all(operand.device.type in ("cpu", "meta") for operand in operands)
    for name, candidate, operations in _LABELLED:
        if backend != name and not (backend == "auto" and candidate is NATIVE and on_cpu):
            continue
        calls = (Call(x.device.type, x.dtype, True, in_forward_mode) for x in operands)
        reason = next(filter(None, map(candidate.why_not, calls)), None)
        if reason is None:
            if candidate is TRITON:
                load()
            return operations
        if backend == name:
            raise BackendError(f"backend {name!r} cannot run here: it {reason}")
    return None


def _operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The image with a batch and the bias, under autocast in the lower precision."""
    check_tensor(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, H, W] or [C, H, W]")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [N, C, kh, kw]")
    batched = x.dim() == 4
    if not batched:
        x = x.unsqueeze(0)
    outs, ins = weight.shape[:2]
    if x.shape[1] != ins:
        raise ValueError(f"x has {x.shape[1]} channels; expected {ins}")
    if bias is not None and bias.shape != (outs,):
        raise ValueError(f"bias has shape {list(bias.shape)}; expected [{outs}]")
    if x.device != weight.device:
        raise ValueError(f"weight is on {weight.device} and x is on {x.device}; move one of them")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    elif weight.dtype != x.dtype:
        raise TypeError(
            f"weight is {weight.dtype} and x is {x.dtype}; convert one, or use torch.autocast"
        )
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(
            f"bias is {bias.dtype} and x is {x.dtype}; convert one, or use torch.autocast"
        )
    return x, bias, batched


def _check_logits(
    weight: torch.Tensor, input_logits: torch.Tensor, output_logits: torch.Tensor
) -> None:
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [N, C, *kernel]")
    outs, ins = weight.shape[:2]
    for name, logits, channels in (
        ("input_logits", input_logits, ins),
        ("output_logits", output_logits, outs),
    ):
        if logits.dim() != 2 or logits.shape[0] != channels or logits.shape[1] < 1:
            raise ValueError(
                f"{name} has shape {list(logits.shape)}; expected [{channels}, groups]"
            )
    if input_logits.shape[1] != output_logits.shape[1]:
        raise ValueError(
            f"input_logits has {input_logits.shape[1]} groups and output_logits "
            f"{output_logits.shape[1]}; expected as many"
        )


def _check_gates(weight: torch.Tensor, gates: torch.Tensor) -> None:
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [N, C, *kernel]")
    outs, ins = weight.shape[:2]
    radices = kronecker_radices(ins, outs)
    if gates.shape != (len(radices),):
        raise ValueError(
            f"gates has shape {list(gates.shape)}; expected [{len(radices)}], one for each of the "
            f"prime factors {radices} of gcd({ins}, {outs})"
        )


def _check_finite(owner: str, values: torch.Tensor) -> None:
    finite = values.detach().isfinite()
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), f"{owner} has NaN or infinite entries")
    elif values.device.type != "meta" and not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{owner} has {values[tuple(place)].item()} at {place}; expected finite numbers: "
            "training has diverged (a smaller learning rate, or fewer decays, may help)"
        )


def _row_labels(operations: LabelledOperations, logits: torch.Tensor, owner: str) -> torch.Tensor:
    if operations is not NATIVE_LABELLED:  # which looks itself
        _check_finite(owner, logits)
    if torch.compiler.is_compiling():
        return operations.row_labels(logits.detach(), owner)
    try:
        return operations.row_labels(logits.detach(), owner)
    except RuntimeError:
        _check_finite(owner, logits)
        raise


def _gate_labels(
    operations: LabelledOperations, weight: torch.Tensor, gates: torch.Tensor, owner: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Labels of inputs and outputs, and a bound of them that does not depend on the gates."""
    outs, ins = weight.shape[:2]
    bound = 1
    for radix in kronecker_radices(ins, outs):
        bound *= radix
    name = f"{owner}.gates"
    if operations is not NATIVE_LABELLED:
        _check_finite(name, gates)
    if torch.compiler.is_compiling():
        return *operations.kronecker_labels(gates.detach(), ins, outs, name), bound
    try:
        return *operations.kronecker_labels(gates.detach(), ins, outs, name), bound
    except RuntimeError:
        _check_finite(name, gates)
        raise
