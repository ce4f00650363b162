"""A network packaged: compiled ahead of time into one file that runs without this library's Python.

    python deploy.py [PACKAGE]

deploy.cpp runs the same file where there is no Python at all.
"""

import sys

import torch

import groupconv_ext as gc

torch.manual_seed(0)
path = sys.argv[1] if len(sys.argv) > 1 else "network.pt2"

network = gc.models.create("flgc_mobilenet_v2", groups=4, width=0.25, classes=10).eval()
deployed = gc.nn.fold(gc.nn.take_over(gc.nn.convert(network)))

images = torch.ones(1, 3, 64, 64)
with torch.no_grad():
    program = torch.export.export(deployed, (images,))
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=path,
        # Weights are constants now, so the compiler may store PyTorch's own in the order it likes.
        inductor_configs={"freezing": True},
    )
    scores = deployed(images)

package = torch._inductor.aoti_load_package(path)
torch.testing.assert_close(package(images), scores)
print(f"packaged: class {scores.argmax()}, score {scores.max():.5f}")
print(f"the kernels: {gc.native_library()}")
