"""Every layer compiled, exported, cast, copied, saved, on meta and in two processes."""

import copy
import io
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from groupconv_ext import Partition
from groupconv_ext.nn import (
    CondenseConv2d,
    DepthwiseSeparableConv2d,
    DGConv2d,
    FLGConv2d,
    GroupedLayer,
    IGCV2Conv2d,
    IGCV3Block,
    InterleavedConv2d,
    TwoLevelConv2d,
    XceptionConv2d,
    convert,
    parameter_groups,
)

RAGGED = Partition.random(12, 12, 3, seed=0, uneven=True)


def condensed() -> CondenseConv2d:
    layer = CondenseConv2d(12, 12, 3, padding=1, groups=4)
    layer.condense(0.2)
    return layer


def frozen(layer: GroupedLayer) -> GroupedLayer:
    layer.freeze_structure()
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "two-level": lambda: TwoLevelConv2d(12, 12, 3, padding=1, groups=3),
    "IGC": lambda: InterleavedConv2d(12, 12, 3, padding=1, primary_groups=4),
    "IGCV2": lambda: IGCV2Conv2d(12, 12, 3, padding=1, branch_channels=[3, 4]),
    "IGCV3": lambda: IGCV3Block(12, 12, expansion=2),
    "separable": lambda: DepthwiseSeparableConv2d(12, 12, 3, padding=1),
    "Xception": lambda: XceptionConv2d(12, 12, 3, padding=1),
    "FLGC": lambda: FLGConv2d(12, 12, 3, padding=1, groups=3),
    "FLGC, frozen": lambda: frozen(FLGConv2d(12, 12, 3, padding=1, groups=3)),
    "FLGC, deployed": lambda: convert(FLGConv2d(12, 12, 3, padding=1, partition=RAGGED)),
    "DGConv": lambda: DGConv2d(12, 12, 3, padding=1, gates=[0, 1, 0]),
    "DGConv, frozen": lambda: frozen(DGConv2d(12, 12, 3, padding=1, gates=[0, 1, 0])),
    "DGConv, deployed": lambda: convert(DGConv2d(12, 12, 3, padding=1, gates=[0, 1, 0])),
    "condensing": condensed,
    "condensed": lambda: convert(condensed()),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return LAYERS[request.param]()


def image(**options: Any) -> torch.Tensor:
    return torch.randn(2, 12, 6, 7, **options)


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(layer(x).square().sum(), [x, *learned]))


def test_compiles_into_one_graph(layer: nn.Module) -> None:
    x = image()
    layer.eval()  # batch statistics would make two calls differ
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    for ours, theirs in zip(gradients(compiled, x), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exports(layer: nn.Module) -> None:
    x = image()
    layer.eval()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_autocast(layer: nn.Module) -> None:
    x = image()
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype in (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().square().sum()
    loss.backward()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32


def test_channels_last_stays_channels_last(layer: nn.Module) -> None:
    x = image()
    last = x.contiguous(memory_format=torch.channels_last)
    layer.eval()
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))
    for ours, theirs in zip(gradients(layer, last), gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_copies_are_independent(layer: nn.Module) -> None:
    x = image()
    layer.eval()
    twin = copy.deepcopy(layer)
    expected = layer(x)
    torch.testing.assert_close(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    torch.testing.assert_close(layer(x), expected)


def test_state_loads_safely(layer: nn.Module, request: pytest.FixtureRequest) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LAYERS[request.node.callspec.params["layer"]]()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = image()
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_meta_device(layer: nn.Module) -> None:
    shape = layer(image()).shape
    meta = layer.to("meta")
    assert meta(image(device="meta")).shape == shape
    filled = meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in filled.parameters():  # memory may hold NaN, and logits may not
            parameter.zero_()
    assert filled(image()).shape == shape


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: TwoLevelConv2d(12, 12, 3, groups=3, **o),
        lambda **o: InterleavedConv2d(12, 12, 3, primary_groups=4, **o),
        lambda **o: IGCV2Conv2d(12, 12, 3, **o),
        lambda **o: XceptionConv2d(12, 12, 3, **o),
        lambda **o: CondenseConv2d(12, 12, 3, groups=4, **o),
    ],
)
def test_device_and_dtype_arguments(make: Callable[..., nn.Module]) -> None:
    layer = make(device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    with torch.device("meta"):
        layer = make()
    assert all(p.is_meta for p in layer.parameters())
    assert layer(image(device="meta")).shape == (2, 12, 4, 5)


def test_what_is_no_image_is_refused(layer: nn.Module) -> None:
    for nothing in (None, [1.0], 3):
        with pytest.raises(TypeError, match="expected a tensor"):
            layer(nothing)


def test_hooks_run_once(layer: nn.Module) -> None:
    calls: list[torch.Size] = []
    layer.eval().register_forward_hook(lambda _, __, y: calls.append(y.shape))
    if not isinstance(layer, IGCV3Block):  # whose normalisations take batches
        layer(image()[0])
    layer(image())
    assert calls[-1] == (2, 12, 6, 7)
    assert calls[:-1] in ([], [(12, 6, 7)])


def test_gradients_of_every_sample(layer: nn.Module) -> None:
    layer = layer.eval().double()
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    x = image(dtype=torch.float64)

    def loss(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(layer, values, (sample[None],))
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, expected in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(found[name][i], expected)


def test_gradients_of_an_ensemble(layer: nn.Module) -> None:
    layer = layer.double()
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    models = {name: torch.stack([p, torch.randn_like(p)]) for name, p in parameters.items()}
    x = image(dtype=torch.float64)
    if isinstance(layer, IGCV3Block):
        layer.eval()  # running statistics are not an ensemble's

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(layer, values, (x,))
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(models)
    for i in range(2):
        one = {name: values[i] for name, values in models.items()}
        for name, expected in torch.func.grad(loss)(one).items():
            torch.testing.assert_close(found[name][i], expected)


def test_forward_mode(layer: nn.Module) -> None:
    layer = layer.eval().double()
    x, direction = image(dtype=torch.float64), image(dtype=torch.float64)
    y, slope = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(y, layer(x))
    step = 1e-4  # linear but for the block's clamps
    numeric = (layer(x + step * direction) - layer(x - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-4)


def test_loading_teaches_nothing_that_was_kept_from_learning(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


# ---- two processes ------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        TwoLevelConv2d(12, 12, 3, padding=1, groups=3),
        nn.ReLU(),
        CondenseConv2d(12, 12, 1, groups=4),
        IGCV2Conv2d(12, 12, 3, padding=1, branch_channels=[3, 4]),
        InterleavedConv2d(12, 12, 3, padding=1, primary_groups=4),
        FLGConv2d(12, 12, 1, groups=3, update_every=2),
        DGConv2d(12, 12, 3, padding=1, gates=[0, 1, 0]),
        frozen(FLGConv2d(12, 12, 1, groups=4)),
    ).double()


def train(model: nn.Module, layers: nn.Sequential, images: torch.Tensor) -> None:
    groups = parameter_groups(layers, weight_decay=0.01)
    # An absent gradient is zero to DistributedDataParallel: the logits of a layer with update_every
    # would be carried on by their momentum there.
    groups[1]["momentum"] = 0.0
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    for step in range(4):
        layers[2].condense(step / 4)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    layers = network()
    images = torch.load(f"{folder}/images.pt", weights_only=True)
    train(DistributedDataParallel(layers), layers, images[2 * rank :][:2])
    torch.save(layers.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_as_one(tmp_path: Any) -> None:
    images = torch.randn(4, 12, 6, 5, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    alone = network()
    train(alone, alone, images)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value)
