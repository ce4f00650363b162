"""A ResNet bottleneck whose groups are permuted, trained beside the same block with masked weights.

Both blocks start from the same weights and see the same data, so they learn the same thing; the
masked one multiplies by all the zeros on the way.
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
    """1×1, 3×3, 1×1 with batch norms, and a shortcut around them."""

    def __init__(self, convolutions: list[nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (NARROW, NARROW, WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolve(y if y is x else y.relu()))
        return (y + x).relu()


def permuted(ins: int, outs: int, kernel: int, seed: int) -> gc.nn.PartitionedConv2d:
    partition = gc.Partition.random(ins, outs, GROUPS, seed=seed)
    return gc.nn.PartitionedConv2d(
        ins, outs, kernel, padding=kernel // 2, bias=False, partition=partition
    )


def train(block: nn.Module, x: torch.Tensor, target: torch.Tensor) -> tuple[list[float], float]:
    """The loss at every step, and the seconds that the last step took."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    losses, seconds = [], 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = functional.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        losses.append(loss.item())
    return losses, seconds


torch.manual_seed(0)
ours = Bottleneck(
    [permuted(WIDE, NARROW, 1, 0), permuted(NARROW, NARROW, 3, 1), permuted(NARROW, WIDE, 1, 2)]
)
masked = Bottleneck([MaskedConv2d(layer) for layer in ours.convolutions])
x = torch.randn(4, WIDE, 28, 28)
target = torch.randn(4, WIDE, 28, 28)

for layer in ours.convolutions:
    print(layer)
found, seconds = train(ours, x, target)
expected, masked_seconds = train(masked, x, target)
for step, (a, b) in enumerate(zip(found, expected, strict=True)):
    print(f"step {step}: loss {a:.5f} in groups, {b:.5f} masked")
print(f"one step: {1e3 * seconds:.0f} ms in groups, {1e3 * masked_seconds:.0f} ms masked")
torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
