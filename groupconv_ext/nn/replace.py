"""Other layers in the place of a network's convolutions, by a rule.

def rule(name, conv):
    if conv.kernel_size == (1, 1):
        return gc.nn.FLGConv2d.from_conv2d(conv, groups=8)

gc.nn.replace(resnet, rule)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

__all__ = ["Rule", "replace", "substitute"]

Rule = Callable[[str, nn.Module], nn.Module | None]


def replace(model: nn.Module, rule: Rule) -> nn.Module:
    """Put what ``rule`` returns in the place of every ``nn.Conv2d`` and ``nn.Conv1d``, in place.

    The rule is asked once for each of them, in the order of ``model.named_modules()``, before
    anything is replaced; a convolution that stands in several places is replaced in all of them.

    Args:
        model: Any network.
        rule: From the name and the convolution to a layer, or to ``None`` to keep it.

    Returns:
        ``model``, or, where that is a convolution itself, what stands for it.

    Raises:
        TypeError: The rule returned something else.
        ValueError: A layer has other channels than the convolution it stands for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; expected an nn.Module")
    found: dict[nn.Module, nn.Module] = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv1d | nn.Conv2d):
            continue
        layer = rule(name, conv)
        if layer is not None:
            _check(name, conv, layer)
            found[conv] = layer.train(conv.training)
    return substitute(model, found)


def _check(name: str, conv: nn.Conv1d | nn.Conv2d, layer: object) -> None:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"the rule returned {layer!r} for {name!r}; expected a module or None")
    for side in ("in_channels", "out_channels"):
        wanted, given = getattr(conv, side), getattr(layer, side, None)
        if given is not None and given != wanted:
            raise ValueError(
                f"the rule returned a layer with {side} = {given} for {name!r}; expected {wanted}"
            )


def substitute(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put ``found[m]`` in the place of every module ``m`` of ``model``, wherever it stands."""
    for parent in list(model.modules()):
        # Not named_children, which tells of a layer in two places only once.
        for name, child in list(parent._modules.items()):
            if child is not None and child in found:
                setattr(parent, name, found[child])
    return found.get(model, model)
