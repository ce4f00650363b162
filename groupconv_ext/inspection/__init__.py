"""``groupconv inspect``: a network as a page, layer by layer, before and after conversion."""

from .measure import Inspection, Layer, inspect
from .page import page

__all__ = ["Inspection", "Layer", "inspect", "page"]
