"""The layers in torch.compile, as one graph without a break, and in an exported program."""

import io

import torch
from torch import nn

import groupconv_ext as gc

torch.manual_seed(0)
partition = gc.Partition.random(16, 32, 4, seed=0)
model = nn.Sequential(
    gc.nn.PartitionedConv2d(16, 32, 3, padding=1, partition=partition, activation="relu"),
    gc.nn.ShuffledConv2d(32, 32, 1, groups=8, activation="hardswish"),
).eval()
x = torch.randn(2, 16, 20, 20)

# "aot_eager" asks of a layer what every compiler does, gradients included, but generates no code,
# which keeps this short. Leave it out for inductor, the default.
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
compiled(x).sum().backward()
torch.testing.assert_close(compiled(x), model(x))
print("compiled: one graph, forward and backward")

batch = torch.export.Dim("batch")
program = torch.export.export(model, (x,), dynamic_shapes=[{0: batch}])
file = io.BytesIO()
torch.export.save(program, file)
file.seek(0)
loaded = torch.export.load(file).module()
for size in (1, 2, 5):
    x = torch.randn(size, 16, 20, 20)
    torch.testing.assert_close(loaded(x), model(x))
print("exported, saved and loaded: runs on any batch")
