"""What the tables count with: a network by its name, its convolutions, its classifier."""

from __future__ import annotations

from functools import cache
from typing import Any

from .. import models
from ..counting import Count, InputSize, LayerCount, count
from ..nn import CondenseConv2d

__all__ = ["counted", "features", "main_path", "without_norms"]


@cache
def counted(name: str, input_size: InputSize | None = None, **options: Any) -> Count:
    """Count a network on the meta device, as it is after training.

    The groups of FLGC start as even as they can. CondenseNet's layers have to condense, which needs
    weights: those are built in full.
    """
    if "even_start" in models.entry(name).options():
        options["even_start"] = True
    network = models.create(name, device="meta", **options)
    if any(isinstance(layer, CondenseConv2d) for layer in network.modules()):
        network = models.condense(models.create(name, **options)).to("meta")
    return count(network, models.entry(name).input_size if input_size is None else input_size)


def without_norms(found: Count) -> Count:
    """Convolutions and linear layers: what most of the papers count."""
    return found.of("convolution", "linear")


def features(found: Count) -> Count:
    """Convolutions, without the classifier."""
    return found.where(lambda layer: _is_feature(layer) and layer.kind == "convolution")


def main_path(found: Count) -> Count:
    """Convolutions, without the classifier and without the projections in shortcuts."""
    return features(found).where(lambda layer: "shortcut" not in layer.name)


def _is_feature(layer: LayerCount) -> bool:
    return not layer.name.startswith("classifier")
