"""The papers' networks, one file a family, and a registry of all of them by name."""

from . import (
    blocks,
    condensenet,
    convolutions,
    igcnet,
    igcv2,
    igcv3,
    mobilenet,
    resnet,
    shufflenet,
    wide_resnet,
)
from .condensenet import condense
from .registry import Entry, create, entry
from .registry import list_models as list  # noqa: A004 (gc.models.list is its name)
from .resnet import learned_groups
from .weights import load_public

__all__ = [
    "Entry",
    "blocks",
    "condense",
    "condensenet",
    "convolutions",
    "create",
    "entry",
    "igcnet",
    "igcv2",
    "igcv3",
    "learned_groups",
    "list",
    "load_public",
    "mobilenet",
    "resnet",
    "shufflenet",
    "wide_resnet",
]
