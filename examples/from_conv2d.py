"""From the layers that a network has to the ones of this library, without changing what it computes."""

import torch
from torch import nn

import groupconv_ext as gc

torch.manual_seed(0)
x = torch.randn(2, 64, 14, 14)


def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print(f"the same: {what}")


# A grouped convolution, taken over as it is.
conv = nn.Conv2d(64, 64, 3, padding=1, groups=4)
layer = gc.nn.PartitionedConv2d.from_conv2d(conv)
compare("nn.Conv2d(groups=4)", layer(x), conv(x))

# The same with ShuffleNet's shuffle behind it: one layer, and the checkpoint loads unchanged. The
# bias of a shuffled layer belongs to the channels where they end up.
shuffled = gc.nn.ShuffledConv2d(64, 64, 3, padding=1, groups=4, bias=False)
shuffled.load_state_dict({"weight": conv.weight})
theirs = nn.functional.conv2d(x, conv.weight, padding=1, groups=4)
compare("a convolution and a channel shuffle", shuffled(x), theirs.view(2, 4, 16, 14, 14).transpose(1, 2).reshape(2, 64, 14, 14))

# index_select on either side of a convolution becomes a part of its partition.
before, after = torch.randperm(64), torch.randperm(64)
partition = layer.partition.permute_inputs(before).permute_outputs(after)
y = gc.conv2d(x, conv.weight, conv.bias[after], partition=partition, padding=1)
compare("index_select, convolution, index_select", y, conv(x[:, before])[:, after])

# Of a dense convolution, keep the connections that a partition has: pruning to groups.
dense = nn.Conv2d(64, 64, 1)
in_labels, out_labels = torch.randint(4, (64,)), torch.randint(4, (64,))
kept = gc.Partition.from_labels(in_labels, out_labels, groups=4)
pruned = gc.nn.PartitionedConv2d.from_conv2d(dense, kept)
masked = nn.functional.conv2d(x, dense.weight * kept.mask()[:, :, None, None], dense.bias)
compare(f"{kept} of a dense 1×1", pruned(x), masked)
