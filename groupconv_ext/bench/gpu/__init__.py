"""The benchmark on a GPU: our kernels against cuDNN, cuBLAS and the other ways of PyTorch.

``benches/gpu.sh`` drives it, part by part; each part can be stopped and taken up again.

- ``suite``: the layers, at batch 256
- ``rivals``: every way to compute them, ours included
- ``clock``: times with a cold L2 cache, with a warm one, and replayed from a CUDA graph
- ``device``: what this device can do at most, and the conditions of the run
- ``state``: what was found so far, a line at a time
- ``layers``: checks and times one problem after another until its time is up
- ``summary``, ``pictures``, ``page``: tables, plots, one HTML page

On the CPU (``--dry-run``) everything runs with tiny problems and a wall clock, to show that it
works; such times mean nothing.
"""
