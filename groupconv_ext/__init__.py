"""Convolutions whose channel groups are learned, permuted or uneven.

>>> import torch, groupconv_ext as gc
>>> p = gc.Partition.random(256, 256, groups=8, seed=0, uneven=True)
>>> layer = gc.nn.PartitionedConv2d(256, 256, 1, partition=p)
>>> layer(torch.randn(1, 256, 56, 56)).shape
torch.Size([1, 256, 56, 56])

Read :mod:`groupconv_ext.partition` first: it holds the one idea.
"""

from . import backends, models, nn, quantization, reference, report
from .chain import chain
from .counting import Count, count
from .doctor import doctor, native_library
from .functional import conv1d, conv2d
from .kept_weights import KeptWeights, keep_weights, kept_weights
from .learned import dgconv_conv2d, dgconv_weight, flgc_conv2d, flgc_weight
from .partition import Partition
from .prologue import Prologue
from .quantization import Quantization, quantized_conv2d
from .separable import separable_conv2d

__version__ = "0.1.0"

__all__ = [
    "Count",
    "KeptWeights",
    "Partition",
    "Prologue",
    "Quantization",
    "__version__",
    "backends",
    "chain",
    "conv1d",
    "conv2d",
    "count",
    "dgconv_conv2d",
    "dgconv_weight",
    "doctor",
    "flgc_conv2d",
    "flgc_weight",
    "keep_weights",
    "kept_weights",
    "models",
    "native_library",
    "nn",
    "quantization",
    "quantized_conv2d",
    "reference",
    "report",
    "separable_conv2d",
]
