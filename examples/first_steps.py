"""Eight uneven groups of scattered channels, forward and backward."""

import torch

import groupconv_ext as gc

p = gc.Partition.random(256, 256, groups=8, seed=0, uneven=True)
x = torch.randn(1, 256, 28, 28, requires_grad=True)
weight = torch.randn(p.entries, 3, 3, requires_grad=True)  # packed: one window a connection
y = gc.conv2d(x, weight, partition=p, padding=1, activation="relu")
y.sum().backward()

dense = torch.nn.functional.conv2d(x, p.unpack(weight), padding=1).relu()
print(p.entries, "of", 256 * 256, "connections")
print("the same as a masked dense convolution:", torch.allclose(y, dense, atol=1e-3))
