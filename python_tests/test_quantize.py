"""From a float network to one in whole numbers: what is replaced, and how close it stays."""

import copy
import io
import pickle

import pytest
import torch
from helpers import PARTITIONS, needs_native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import groupconv_ext as gc
from groupconv_ext.nn import PartitionedConv2d, QuantizedPartitionedConv2d, quantize
from groupconv_ext.quantization import Quantization, prepare_weight, quantize_weight

pytestmark = needs_native

RAGGED = gc.Partition.random(16, 32, 4, seed=0, uneven=True)


def network(activation: str | None = "relu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        PartitionedConv2d(16, 32, 1, partition=RAGGED, activation=activation),
        PartitionedConv2d(32, 32, 3, 2, 1, groups=4, bias=False),
        nn.ReLU(),
        PartitionedConv2d(32, 8, 3, padding=2, dilation=2),
    ).eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 16, 9, 9) + 0.5 for _ in range(count)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- numbers -------------------------------------------------------------------------------------


def test_a_range_and_its_zero() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-42, 0.0)):
        scale, zero_point = found = Quantization.from_range(low, high)
        assert 0 <= zero_point <= 255
        x = torch.linspace(low, high, 100).view(1, 1, 10, 10)
        assert (found.dequantize(found.quantize(x)) - x).abs().max() <= 0.51 * scale
        assert found.dequantize(found.quantize(torch.zeros(1, 1, 1, 1))) == 0.0


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="range is"):
        Quantization.from_range(low, high)


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_weights_by_channel(partition: gc.Partition) -> None:
    weight = torch.randn(partition.entries, 3, 2)
    weight *= (
        partition.pack(
            10.0
            ** torch.arange(partition.out_channels)
            .float()[:, None]
            .expand(-1, partition.in_channels)
        )[:, None, None]
        if partition.entries
        else 1.0
    )
    q, scale = quantize_weight(weight, None, partition, Quantization(0.1, 3))
    dense, dense_q = partition.unpack(weight), partition.unpack(q)
    assert (
        (dense_q * scale[:, None, None, None] - dense).abs().amax((1, 2, 3)) <= 0.501 * scale
    ).all()
    read = [
        out
        for outs, ins in zip(partition.outputs, partition.inputs, strict=True)
        if ins
        for out in outs
    ]
    assert (dense_q.int().abs().amax((1, 2, 3))[read] == 127).all()


def test_a_bias_beside_which_the_weights_are_nothing() -> None:
    """As normalisations of dead channels make them: too many steps of the weight for 32 bits."""
    conv = PartitionedConv2d(4, 2, 1, partition=gc.Partition.contiguous(4, 2, 1))
    with torch.no_grad():
        conv.weight[:4] = 1e-12
        conv.weight[4:] = 0.0
        conv.bias.copy_(torch.tensor([0.75, -3.0]))
    y = QuantizedPartitionedConv2d(conv, Quantization(0.01, 9))(torch.rand(1, 4, 2, 2))
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([0.75, -3.0]), rtol=1e-6, atol=0.0)


def test_sums_that_32_bits_cannot_hold() -> None:
    partition = gc.Partition.contiguous(70_000, 1, 1)
    weight = torch.full((70_000, 1, 1), 127, dtype=torch.int8)
    with pytest.raises(ValueError, match="beyond 32 bits"):
        prepare_weight(weight, torch.ones(1), partition=partition, read_as=Quantization(1.0, 0))


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_close_to_the_float_network(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = batches()[0].contiguous(memory_format=layout)
    model = network()
    expected = model(x).detach()
    assert quantize(model, batches()) is model
    assert [type(layer) for layer in model] == [
        *[QuantizedPartitionedConv2d] * 2,
        nn.ReLU,
        QuantizedPartitionedConv2d,
    ]
    with torch.inference_mode():
        y = model(x)
        between = model[0](x)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=layout)
    assert 1e-4 < error(y, expected) < 0.02
    # The second layer reads what the first writes, as it is.
    assert between.dtype == torch.uint8
    assert model[0].write_as == model[1].read_as
    assert model[1].write_as is None
    assert torch.equal(model[1](between), model[1](model[0].write_as.dequantize(between)))


def test_unbatched() -> None:
    model = quantize(network(), batches())
    x = batches()[0]
    with torch.inference_mode():
        assert torch.equal(model(x[0]), model(x)[0])


def test_what_stays_in_float() -> None:
    model = nn.ModuleDict(
        {
            "silu": PartitionedConv2d(16, 16, 1, activation="silu"),
            "mirror": PartitionedConv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            "torch": nn.Conv2d(16, 16, 1),
            "residual": PartitionedConv2d(16, 16, 1),
            "prologue": PartitionedConv2d(16, 16, 1),
            "channelwise": PartitionedConv2d(16, 16, 3, padding=1, groups=16),
            "plain": PartitionedConv2d(16, 16, 1),
        }
    ).eval()
    scale = torch.rand(16)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = model["channelwise"](model["torch"](model["mirror"](model["silu"](x))))
            x = model["residual"](x, residual=x)
            x = model["prologue"](x, prologue=gc.Prologue(scale))
            return model["plain"](x, None)

    found = quantize(Network().eval(), batches())
    names = [n for n, m in found.named_modules() if isinstance(m, QuantizedPartitionedConv2d)]
    assert names == ["layers.plain"]


def test_a_layer_in_two_places_is_one_layer() -> None:
    conv = PartitionedConv2d(16, 16, 1)
    model = quantize(nn.Sequential(conv, conv).eval(), batches())
    assert model[0] is model[1]
    assert model[0].write_as is None


def test_a_model_that_is_a_layer() -> None:
    layer = quantize(PartitionedConv2d(16, 16, 1).eval(), batches())
    assert isinstance(layer, QuantizedPartitionedConv2d)


def test_converted_and_folded_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        gc.nn.FLGConv2d(16, 32, 1, groups=4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        gc.nn.ShuffledConv2d(32, 16, 1, groups=2),
    )
    for batch in batches():
        model(batch)
    model = gc.nn.fold(gc.nn.convert(model.eval()))
    expected = model(batches()[0]).detach()
    quantize(model, batches())
    assert isinstance(model[0], QuantizedPartitionedConv2d)
    with torch.inference_mode():
        assert error(model(batches()[0]), expected) < 0.02


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_calibration_refuses_what_is_not_finite(bad: float, at: int) -> None:
    found = batches()
    found[at][1, 2, 3, 4] = bad
    model = network()
    with pytest.raises(ValueError, match=r"layer '0' cannot be quantised.*range"):
        quantize(model, found)
    assert isinstance(model[0], PartitionedConv2d)
    assert not model[0]._forward_pre_hooks


def test_calibration_refuses_other_mistakes() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        quantize(network(), [])
    with pytest.raises(ValueError, match=r"eval\(\)"):
        quantize(network().train(), batches())
    with pytest.raises(ValueError, match=r"layer '0' cannot.*float64; call model\.float\(\)"):
        quantize(network().double(), [batch.double() for batch in batches()])
    with pytest.raises(ValueError, match=r"layer '0' cannot.*on meta; move the model"):
        quantize(network().to("meta"), batches())
    with pytest.raises(TypeError, match=r"nn\.Module"):
        quantize("network", batches())  # type: ignore[arg-type]
    model = network()
    model.register_module("never", PartitionedConv2d(4, 4, 1))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'never' read nothing"):
        quantize(model, batches())
    model = network()
    with torch.no_grad():
        model[3].bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"layer '3' cannot be quantised.*NaN"):
        quantize(model, batches())
    assert isinstance(model[0], PartitionedConv2d)


def test_layers_refuse() -> None:
    with pytest.raises(ValueError, match="silu"):
        QuantizedPartitionedConv2d(
            PartitionedConv2d(4, 4, 1, activation="silu"), Quantization(1.0, 0)
        )
    with pytest.raises(ValueError, match="no PartitionedConv2d"):
        QuantizedPartitionedConv2d(nn.Conv2d(4, 4, 1), Quantization(1.0, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero_point 256"):
        QuantizedPartitionedConv2d(PartitionedConv2d(4, 4, 1), Quantization(1.0, 256))
    layer = QuantizedPartitionedConv2d(PartitionedConv2d(4, 4, 1), Quantization(1.0, 0))
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer(torch.randn(1, 4, 3, 3, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(1, 4, 3, 3, requires_grad=True))
    with pytest.raises(ValueError, match="4, H, W"):
        layer(torch.randn(1, 5, 3, 3))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(1, 4, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="padded input"):
        QuantizedPartitionedConv2d(PartitionedConv2d(4, 4, 3), Quantization(1.0, 0))(
            torch.randn(1, 4, 2, 2)
        )


def test_the_function_refuses() -> None:
    partition = gc.Partition.contiguous(4, 4, 2)
    stored = Quantization(0.1, 0)
    weight = torch.ones(8, 1, 1, dtype=torch.int8)
    good = prepare_weight(weight, torch.ones(4), partition=partition, read_as=stored)
    x = torch.zeros(1, 4, 3, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"weight\.read_as\.quantize"):
        gc.quantized_conv2d(x.float(), good, partition=partition)
    with pytest.raises(TypeError, match="prepare_weight"):
        gc.quantized_conv2d(x, weight, partition=partition)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Partition"):
        gc.quantized_conv2d(x, good, partition=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hardswish"):
        gc.quantized_conv2d(x, good, partition=partition, activation="hardswish")
    with pytest.raises(ValueError, match="write_as has scale"):
        gc.quantized_conv2d(x, good, partition=partition, write_as=Quantization(-1.0, 0))
    for bad, message in (
        ({"weight": weight.float()}, "expected int8"),
        ({"weight": weight[1:]}, "expected int8"),
        ({"scale": torch.zeros(4)}, "positive"),
        ({"scale": torch.ones(3)}, "scale is"),
        ({"bias": torch.ones(4).double()}, "bias is"),
        ({"bias": torch.full((4,), 1e12)}, "beyond 32 bits"),
        ({"bias": torch.full((4,), torch.nan)}, "beyond 32 bits"),
    ):
        arguments = {"weight": weight, "scale": torch.ones(4), "bias": None} | bad
        with pytest.raises(ValueError, match=message):
            prepare_weight(**arguments, partition=partition, read_as=stored)


def test_not_on_a_gpu() -> None:
    """Tensors that only say they are there; the checks come before anything is computed."""
    partition = gc.Partition.contiguous(4, 4, 2)
    weight = torch.ones(8, 1, 1, dtype=torch.int8)
    good = prepare_weight(weight, torch.ones(4), partition=partition, read_as=Quantization(1.0, 0))
    with FakeTensorMode():
        x = torch.empty(1, 4, 3, 3, dtype=torch.uint8, device="cuda")
        with pytest.raises(ValueError, match="cuda:0; quantised convolutions run on the CPU"):
            gc.quantized_conv2d(x, good, partition=partition)
        with pytest.raises(ValueError, match="run on the CPU"):
            Quantization(1.0, 0).quantize(x.float())
    layer = PartitionedConv2d(4, 4, 1, device="meta")
    with pytest.raises(ValueError, match="on meta; move the model to the CPU"):
        QuantizedPartitionedConv2d(layer, Quantization(1.0, 0))


# ---- torch around it -----------------------------------------------------------------------------


def test_state_dict_round_trip() -> None:
    x = batches()[0]
    model = quantize(network(), batches())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    # Other weights, other partitions of the same sizes, other ranges.
    other = network("relu6")
    other[1] = PartitionedConv2d(
        32, 32, 3, 2, 1, partition=gc.Partition.random(32, 32, 4, seed=5), bias=False
    )
    other = quantize(other.eval(), [100 * batch for batch in batches()])
    other[0].activation = "relu"
    with torch.inference_mode():
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other(x), model(x))
    assert other[1].partition == model[1].partition


def test_a_checkpoint_of_other_sizes() -> None:
    model = quantize(network(), batches())
    state = model[1].state_dict()
    other = QuantizedPartitionedConv2d(
        PartitionedConv2d(32, 32, 3, 2, 1, groups=2, bias=False), Quantization(1.0, 0)
    )
    before = other.weight.clone()
    with pytest.raises(ValueError, match="same sizes"):
        other.load_state_dict(state)
    assert torch.equal(other.weight, before)


def test_copies() -> None:
    x, model = batches()[0], quantize(network(), batches())
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert "zero" not in repr(model[0])
    assert "read_as=" in repr(model[0])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_and_export(backend: str) -> None:
    x, model = batches()[0], quantize(network(), batches())
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), expected)
