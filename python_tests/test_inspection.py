"""The page about a network: what it measures, what it shows, how the command fails."""

import re
import struct
import zlib
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import groupconv_ext as gc
from groupconv_ext import cli
from groupconv_ext.inspection import inspect, page
from groupconv_ext.inspection.pictures import MOST_PIXELS, mask_pictures

RAGGED = gc.Partition.random(12, 16, 3, seed=0, uneven=True)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, groups=3),
        nn.Sequential(gc.nn.FLGConv2d(12, 16, 1, partition=RAGGED), nn.ReLU()),
        gc.nn.InterleavedConv2d(16, 16, 3, padding=1, primary_groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def test_layers_are_counted_and_timed_before_and_after() -> None:
    model = network()
    modes = [module.training for module in model.modules()]
    found = inspect(model, 16, title="<tiny>", rounds=2)
    assert [layer.counted.name for layer in found.layers] == ["0", "1.0", "2", "5"]
    assert [list(layer.partitions) for layer in found.layers] == [
        [""],
        [""],
        ["primary", "secondary"],
        [],
    ]
    assert found.layers[0].partitions[""] == gc.Partition.contiguous(3, 12, 3)
    assert found.layers[1].partitions[""] == RAGGED
    assert found.input_size == (3, 16, 16)
    assert all(layer.before_ms > 0 and layer.after_ms > 0 for layer in found.layers)
    assert found.before_ms > 0
    assert found.after_ms > 0
    assert isinstance(model[1][0], gc.nn.FLGConv2d)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_page_needs_nothing_else() -> None:
    text = page(inspect(network(), 16, title="<tiny>", rounds=1, conditions={"cpu": "a & b"}))
    assert "&lt;tiny&gt;" in text
    assert "<tiny>" not in text
    assert "a &amp; b" in text
    assert not re.search(r"(src|href)=.(?!data:)", text)
    assert text.count("<img") == 2 * 4
    assert f"{RAGGED.entries + 16:,}" in text
    assert f"{12 * 16 + 16:,}" in text
    assert text.count("<tr>") == 1 + 3 + 1 + 4  # heads, sums, layers


def pixels(address: str) -> np.ndarray:
    """What a picture shows, read again without the code that wrote it."""
    data = b64decode(address.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(data[start : start + length]), np.uint8)
    return rows.reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)


def test_pictures_show_the_mask() -> None:
    numbered, ordered = (pixels(address) for address in mask_pictures(RAGGED))
    dark = numbered[:, :, 0] < 128
    assert np.array_equal(dark, RAGGED.mask().numpy())
    outputs = [c for group in RAGGED.outputs for c in group]
    inputs = [c for group in RAGGED.inputs for c in group]
    assert np.array_equal(ordered[:, :, 0] < 128, dark[outputs][:, inputs])


def test_pictures_of_overlapping_and_unread_inputs() -> None:
    partition = gc.Partition(6, 4, [[5, 1, 0], [1, 2]], [[3, 0], [2, 1]])
    _, ordered = mask_pictures(partition)
    dark = pixels(ordered)[:, :, 0] < 128
    assert dark.astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],
    ]


def test_large_pictures_shrink() -> None:
    shown = pixels(mask_pictures(gc.Partition.contiguous(1000, 300, 10))[0])
    assert shown.shape == (MOST_PIXELS, MOST_PIXELS, 3)
    assert (shown[0, 0] < 10).sum() >= 1
    assert (shown[0, -1] == 238).all()


def run(*arguments: str) -> int:
    threads = torch.get_num_threads()
    try:
        return cli.main(["inspect", *arguments, "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)


def test_command_leaves_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    trained = gc.models.create("condensenet_cifar", depth=8, groups=2)
    gc.models.condense(trained)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    options = ("--set", "depth=8", "--set", "groups=2", "--out", str(tmp_path / "page.html"))
    assert run("condensenet_cifar", *options) == 0
    assert run("condensenet_cifar", *options, "--weights", str(tmp_path / "weights.pt")) == 0
    assert "ms before conversion" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert "condensenet_cifar, depth=8, groups=2" in text
    assert "features.1.pointwise.conv" in text
    assert "CondenseConv2d" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["igvc3"], "did you mean 'igcv3'"),
        (["igcv3", "--set", "widht=1"], "did you mean 'width'"),
        (["igcv3", "--set", "width"], "expected OPTION=VALUE"),
        (["igcv3", "--set", "width=wide"], "model 'igcv3' with {'width': 'wide'}"),
        (["igc_l24m2", "--size", "2"], "expected at least 4 × 4"),
        (["igc_l24m2", "--weights", "nowhere.pt"], "nowhere.pt does not fit"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_refuses_weights_of_another_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(gc.models.create("igc_l4m8", depth=8).state_dict(), tmp_path / "weights.pt")
    weights = str(tmp_path / "weights.pt")
    out = tmp_path / "page.html"
    assert run("igc_l24m2", "--set", "depth=8", "--weights", weights, "--out", str(out)) == 2
    assert "size mismatch" in capsys.readouterr().err
    assert not out.exists()


def test_refuses_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        inspect(network(), 16, rounds=0)
