"""From the layers that a network has to those of this library."""

import torch
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

torch.manual_seed(0)
x = torch.randn(2, 64, 14, 14)


def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print("the same:", what)


# A grouped convolution, taken over as it is.
conv = nn.Conv2d(64, 64, 3, padding=1, groups=4)
layer = gc.nn.PartitionedConv2d.from_conv2d(conv)
compare("nn.Conv2d(groups=4)", layer(x), conv(x))

# The same with ShuffleNet's channel shuffle behind it is one layer, and loads the checkpoint as it
# is. (Not its bias: a shuffled layer adds the bias to the channels where they end up.)
bare = nn.Conv2d(64, 64, 3, padding=1, groups=4, bias=False)
shuffled = gc.nn.ShuffledConv2d(64, 64, 3, padding=1, groups=4, bias=False)
shuffled.load_state_dict(bare.state_dict())
compare("a grouped convolution, then a shuffle", shuffled(x), nn.ChannelShuffle(4)(bare(x)))

# index_select on either side of a convolution becomes a part of its partition.
before, after = torch.randperm(64), torch.randperm(64)
partition = layer.partition.permute_inputs(before).permute_outputs(after)
y = gc.conv2d(x, conv.weight, conv.bias[after], partition=partition, padding=1)
compare("index_select, convolution, index_select", y, conv(x[:, before])[:, after])

# Of a dense convolution only the connections of a partition: pruned to groups.
dense = nn.Conv2d(64, 64, 1)
kept = gc.Partition.from_labels(torch.randint(4, (64,)), torch.randint(4, (64,)), groups=4)
pruned = gc.nn.PartitionedConv2d.from_conv2d(dense, kept)
masked = dense.weight * kept.mask()[:, :, None, None]
compare(
    f"a masked dense convolution and {kept}", pruned(x), functional.conv2d(x, masked, dense.bias)
)
