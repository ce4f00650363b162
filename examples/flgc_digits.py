"""A small network learns its groups on scikit-learn's digits, and is converted.

Half of the training the groups are learned with the weights; then they stay, and the weights alone
go on. What is left at the end are packed weights of a quarter of the connections.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import groupconv_ext as gc

GROUPS, WIDTH, EPOCHS, BATCH = 4, 32, 8, 64


def network() -> nn.Module:
    def block(stride: int) -> list[nn.Module]:
        return [
            gc.nn.FLGConv2d(WIDTH, WIDTH, 1, groups=GROUPS, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            gc.nn.PartitionedConv2d(WIDTH, WIDTH, 3, stride, 1, groups=WIDTH, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        ]

    stem = [nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(*stem, *block(1), *block(2), *block(1), *head)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    groups = gc.nn.parameter_groups(model, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:
            for layer in model.modules():
                if isinstance(layer, gc.nn.GroupedLayer):
                    layer.freeze_structure()
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more do not help images of 8×8
    images, labels = digits()
    kept = slice(500, None)
    model = network()
    train(model, images[kept], labels[kept])
    before = gc.count(model, (1, 8, 8))
    learned = accuracy(model, images[:500], labels[:500])
    fast = gc.nn.fold(gc.nn.convert(model))
    converted = accuracy(fast, images[:500], labels[:500])
    after = gc.count(fast, (1, 8, 8))
    print(f"{learned:.1%} of 500 digits right, {converted:.1%} after conversion")
    print(f"{before.dense_multiply_adds:,} multiply-adds became {after.multiply_adds:,}")
    for name, partition in gc.nn.structure(fast).items():
        if partition.groups == GROUPS:
            print(f"{name}: {partition}")
