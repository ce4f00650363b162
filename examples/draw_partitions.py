"""Every way of making a Partition, drawn: the pictures of docs/partitions.md.

    python examples/draw_partitions.py [folder]

Needs matplotlib.
"""

import io
import sys
from pathlib import Path

import matplotlib
from PIL import Image

import groupconv_ext as gc

matplotlib.use("agg")

PARTITIONS = {
    "contiguous": gc.Partition.contiguous(16, 16, groups=4),
    "shuffled": gc.Partition.shuffled(16, 16, groups=4),
    "interleaved": gc.Partition.interleaved(16, 16, groups=4),
    "from_labels": gc.Partition.from_labels(
        in_labels=[2, 0, 1, 1, 2, 0, 0, 2, 1, 2, 2, 0],
        out_labels=[0, 1, 2, 0, 2, 2, 1, 0, 2, 0],
        groups=3,
    ),
    "kronecker": gc.Partition.kronecker([0, 1, 0, 1], 16, 16),
    "from_lists": gc.Partition.from_lists(
        inputs=[[0, 3, 4, 7], [3, 4, 8], []],
        outputs=[[0, 2, 5], [1, 6, 7], [3, 4]],
        in_channels=10,
        out_channels=8,
    ),
    "random": gc.Partition.random(64, 64, groups=8, seed=0),
    "random_uneven": gc.Partition.random(64, 64, groups=8, seed=0, uneven=True),
}

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
for name, partition in PARTITIONS.items():
    drawn = io.BytesIO()
    gc.report.plot_partition(partition).savefig(drawn, dpi=66)
    # A palette of 64 colours makes the file a third as long.
    Image.open(drawn).convert("RGB").quantize(64).save(folder / f"{name}.png", optimize=True)
    print(f"{name}.png  {partition}")
