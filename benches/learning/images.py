"""Small images of digits: drawn here, or scikit-learn's.

``strokes`` draws the ten digits as polylines in the unit square, moves every corner a little,
turns, shears, scales and shifts the whole, and takes 8×8 grey values from the distance to the
nearest stroke, with noise. ``digits`` is scikit-learn's collection of 1797 scanned ones, which
comes with that package; nothing is downloaded.
"""

from __future__ import annotations

import math

import torch

SIDE = 8

Data = tuple[torch.Tensor, torch.Tensor]

_ROUND = [(0.5 + 0.28 * math.sin(a), 0.5 - 0.4 * math.cos(a)) for a in torch.linspace(0, 6.283, 9)]
_DIGITS: tuple[list[tuple[float, float]], ...] = (
    _ROUND,
    [(0.35, 0.25), (0.52, 0.1), (0.52, 0.9)],
    [(0.25, 0.3), (0.35, 0.12), (0.65, 0.12), (0.75, 0.3), (0.25, 0.9), (0.78, 0.9)],
    [(0.25, 0.15), (0.72, 0.15), (0.48, 0.45), (0.75, 0.65), (0.6, 0.88), (0.25, 0.85)],
    [(0.68, 0.9), (0.68, 0.1), (0.22, 0.65), (0.82, 0.65)],
    [(0.75, 0.1), (0.3, 0.1), (0.28, 0.45), (0.65, 0.45), (0.74, 0.7), (0.55, 0.9), (0.25, 0.85)],
    [(0.65, 0.1), (0.35, 0.4), (0.28, 0.7), (0.45, 0.9), (0.7, 0.8), (0.68, 0.55), (0.3, 0.6)],
    [(0.22, 0.12), (0.78, 0.12), (0.42, 0.9)],
    [(0.5, 0.48), (0.28, 0.3), (0.5, 0.1), (0.72, 0.3), (0.5, 0.48), (0.25, 0.7), (0.5, 0.9),
     (0.75, 0.7), (0.5, 0.48)],
    [(0.7, 0.4), (0.35, 0.45), (0.3, 0.2), (0.5, 0.1), (0.7, 0.2), (0.7, 0.5), (0.55, 0.9)],
)  # fmt: skip


def strokes(count: int, seed: int) -> Data:
    """``count`` images ``[count, 1, 8, 8]`` and their digits."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, 10, (count,), generator=generator)
    longest = max(map(len, _DIGITS))
    # A last corner that is repeated adds strokes of no length.
    corners = torch.tensor([[*d, *([d[-1]] * (longest - len(d)))] for d in _DIGITS])[digits]
    corners = corners + 0.035 * torch.randn(corners.shape, generator=generator)

    def between(low: float, high: float, *sizes: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *sizes, generator=generator)

    turn, shear, scale = between(-0.35, 0.35), between(-0.3, 0.3), between(0.65, 1.05)
    rows = [
        turn.cos() + shear * turn.sin(),
        shear * turn.cos() - turn.sin(),
        turn.sin(),
        turn.cos(),
    ]
    affine = scale[:, None, None] * torch.stack(rows, 1).view(count, 2, 2)
    shift = between(-0.12, 0.12, 1, 2)
    corners = (corners - 0.5) @ affine.mT + 0.5 + shift

    axis = (torch.arange(SIDE) + 0.5) / SIDE
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, SIDE**2, 1, 2)
    start, step = corners[:, None, :-1], (corners[:, 1:] - corners[:, :-1])[:, None]
    along = ((pixels - start) * step).sum(-1) / step.square().sum(-1).clamp(min=1e-6)
    nearest = start + along.clamp(0, 1)[..., None] * step
    distance = (pixels - nearest).norm(dim=-1).amin(2)
    ink = torch.sigmoid((between(0.04, 0.09, 1) - distance) / 0.03)
    ink = ink + 0.15 * torch.randn(ink.shape, generator=generator)
    return ink.view(count, 1, SIDE, SIDE), digits


def scanned(seed: int) -> tuple[Data, Data]:
    """scikit-learn's digits, cut at random into 1297 to train with and 500 to test with."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (optional)
    except ImportError as missing:
        raise SystemExit(
            "--task digits reads the data set inside scikit-learn: pip install "
            "'groupconv-ext[experiments]', or take --task strokes"
        ) from missing
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    digits = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    train, test = order[:-500], order[-500:]
    return (images[train], digits[train]), (images[test], digits[test])


def load(task: str, seed: int) -> tuple[Data, Data]:
    """Images to train with and images to test with."""
    if task == "digits":
        return scanned(seed)
    return strokes(1297, 2 * seed), strokes(2000, 2 * seed + 1)
