"""The 1×1 convolutions of a plain PyTorch ResNet become FLGC layers: five lines, `rule`.

Then it trains as before, its layers learning their groups, and is converted.
"""

import torch
from torch import nn

import groupconv_ext as gc


class Bottleneck(nn.Module):
    def __init__(self, ins: int, width: int, outs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(ins, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outs, 1, bias=False),
            nn.BatchNorm2d(outs),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [Bottleneck(32, 32, 128, 1), Bottleneck(128, 64, 256, 2), Bottleneck(256, 64, 256, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def rule(name: str, conv: nn.Conv2d) -> nn.Module | None:
    if conv.kernel_size == (1, 1):
        return gc.nn.FLGConv2d.from_conv2d(conv, groups=8)
    return None


torch.manual_seed(0)
model = resnet()
plain = gc.count(model, 32)
gc.nn.replace(model, rule)

optimizer = torch.optim.SGD(gc.nn.parameter_groups(model, 1e-4), lr=0.05, momentum=0.9)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
for _ in range(5):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

model.eval()
with torch.inference_mode():
    expected = model(images)
    fast = gc.nn.fold(gc.nn.convert(model))
    torch.testing.assert_close(fast(images), expected, rtol=1e-3, atol=1e-3)
after = gc.count(fast, 32)
print(f"{plain.multiply_adds:,} multiply-adds became {after.multiply_adds:,}, the outputs the same")
