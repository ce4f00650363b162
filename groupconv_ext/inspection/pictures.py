"""A partition as a small picture inside a page: how dense every patch of its mask is.

Twice: with the channels in their own order, and sorted into groups, where what is computed stands
on the diagonal. Pictures are PNG files in a ``data:`` address, so that a page needs nothing else.
"""

from __future__ import annotations

import base64
import struct
import zlib
from itertools import chain

import numpy as np
import numpy.typing as npt

from ..partition import Partition

__all__ = ["mask_pictures"]

MOST_PIXELS = 64
PAPER = np.array([238, 238, 238.0])
INK = np.array([0, 83, 140.0])

Mask = npt.NDArray[np.float64]


def mask_pictures(partition: Partition) -> tuple[str, str]:
    """Two ``data:`` addresses: channels as they are numbered, and sorted by group."""
    mask = partition.mask().numpy().astype(np.float64)
    outputs = list(chain.from_iterable(partition.outputs))
    # An input of several groups stands where the first of them reads it, one of none at the end.
    inputs = list(dict.fromkeys(chain.from_iterable(partition.inputs)))
    inputs += sorted(set(range(partition.in_channels)) - set(inputs))
    return _address(mask), _address(mask[outputs][:, inputs])


def _address(mask: Mask) -> str:
    density = _shrink(_shrink(mask).T).T
    strength = np.sqrt(density)[..., None]  # so that one connection among many can still be seen
    pixels = np.rint(PAPER + (INK - PAPER) * strength).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode()


def _shrink(mask: Mask) -> Mask:
    """At most so many rows, each the mean of those it stands for."""
    rows = len(mask)
    if rows <= MOST_PIXELS:
        return mask
    bounds = np.arange(MOST_PIXELS + 1) * rows // MOST_PIXELS
    shrunk: Mask = np.add.reduceat(mask, bounds[:-1], axis=0) / np.diff(bounds)[:, None]
    return shrunk


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A true-colour PNG without any filter."""
    height, width, _ = pixels.shape

    def piece(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + piece(b"IHDR", header)
        + piece(b"IDAT", zlib.compress(rows, 9))
        + piece(b"IEND", b"")
    )
