"""A ResNet bottleneck whose groups are permuted, trained beside the same block with masked weights.

Both blocks start from the same weights and see the same data, so they learn the same; the masked
one also multiplies by all the zeros.
"""

import time

import torch
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

GROUPS, WIDE, NARROW, STEPS = 8, 256, 64, 5


class MaskedConv2d(nn.Conv2d):
    """What people write today: a dense convolution times a 0/1 mask."""

    def __init__(self, layer: gc.nn.PartitionedConv2d) -> None:
        p = layer.partition
        super().__init__(
            p.in_channels, p.out_channels, layer.kernel_size, padding=layer.padding, bias=False
        )
        self.register_buffer("mask", p.mask(torch.float32)[:, :, None, None])
        with torch.no_grad():
            self.weight.copy_(p.unpack(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight * self.mask, padding=self.padding)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1, each with its batch norm, and a shortcut around them."""

    def __init__(self, reduce: nn.Module, spatial: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.reduce, self.spatial, self.expand = reduce, spatial, expand
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (NARROW, NARROW, WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](self.reduce(x)).relu()
        y = self.norms[1](self.spatial(y)).relu()
        return (self.norms[2](self.expand(y)) + x).relu()


def permuted(ins: int, outs: int, kernel: int, seed: int) -> gc.nn.PartitionedConv2d:
    partition = gc.Partition.random(ins, outs, GROUPS, seed=seed)
    return gc.nn.PartitionedConv2d(
        ins, outs, kernel, padding=kernel // 2, bias=False, partition=partition
    )


def train(block: nn.Module, x: torch.Tensor, target: torch.Tensor) -> tuple[list[float], float]:
    """The loss at every step, and the seconds of the fastest one."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = functional.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, min(seconds)


torch.manual_seed(0)
torch.set_num_threads(1)  # so that the times compare the work, whatever else this machine does
layers = (
    permuted(WIDE, NARROW, 1, 0),
    permuted(NARROW, NARROW, 3, 1),
    permuted(NARROW, WIDE, 1, 2),
)
ours, masked = Bottleneck(*layers), Bottleneck(*map(MaskedConv2d, layers))
x, target = torch.randn(2, 4, WIDE, 28, 28)

for layer in layers:
    print(layer)
losses, seconds = train(ours, x, target)
expected, masked_seconds = train(masked, x, target)
for step, pair in enumerate(zip(losses, expected, strict=True)):
    print("step {}: loss {:.5f} in groups, {:.5f} masked".format(step, *pair))
torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
print(f"the fastest step: {1e3 * seconds:.0f} ms in groups, {1e3 * masked_seconds:.0f} ms masked")
