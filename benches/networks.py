"""Whole networks against plain PyTorch: `python benches/networks.py`.

Each network runs in several forms, one after another in every round, and each round begins with
another form, so that a slow moment falls on all of them. Forward (evaluation, N=1):

    ours              the network as it trains, its learned layers still learning
    ours, converted   groups fixed, weights packed
    ours, folded      dense layers taken over, normalisations folded into the convolutions
    ours, compiled    folded, through torch.compile with freezing            (--compile)
    ours, packaged    folded, exported and compiled ahead, no Python within  (--package)
    plain             index_select and grouped convolutions, the same function
    plain, folded     the same with its normalisations folded
    plain, compiled   folded, through torch.compile with freezing            (--compile)
    plain, packaged   folded, exported and compiled ahead, no Python within  (--package)
    unpermuted        grouped convolutions alone: the same work, another function
    standard          the network of dense convolutions that it replaces

and a training step (forward, backward, SGD with momentum; `--train`): ours, plain (learned groups
as a dense convolution of a masked weight), unpermuted, standard. Outputs of ours and plain are
compared before anything is timed. Leaves networks.json with everything, networks.csv, networks.md
and, with matplotlib, networks.png: time against multiply-adds; another run into the same folder
adds to them. `--engines` adds ONNX Runtime and OpenVINO where they are installed; `--layout NHWC`
has every form in channels_last.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plain import fold_plain, plain
from torch import nn

import groupconv_ext as gc
from groupconv_ext.bench import machine
from groupconv_ext.bench.results import write_whole
from groupconv_ext.bench.timing import Plan, Timing, interleave

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """What is measured: a model, its images, and the standard network it replaces."""

    model: str
    options: dict[str, Any]
    size: int
    standard: str
    standard_options: dict[str, Any]
    batch: int = 1  # of a training step


def _half_open(channels: int) -> list[int]:
    """Gates of 32 groups, whose channels are not neighbours."""
    return [1] * (channels.bit_length() - 6) + [0] * 5


NETWORKS = {
    "ResNet50-FLGC G=4": Network(
        "flgc_resnet50", {"groups": 4, "classes": 1000}, 224, "resnet50", {}, 4
    ),
    "ResNet50-FLGC G=8": Network(
        "flgc_resnet50", {"groups": 8, "classes": 1000}, 224, "resnet50", {}, 4
    ),
    "MobileNetV2-FLGC G=4": Network(
        "mobilenet_v2", {"convolution": "flgc", "groups": 4}, 224, "mobilenet_v2", {}, 4
    ),
    "IGCV3": Network("igcv3", {}, 224, "mobilenet_v2", {}, 4),
    "IGCV2-1.0": Network("igcv2", {}, 224, "mobilenet_v1", {}, 4),
    "CondenseNet-74 G=4": Network(
        "condensenet74", {"groups": 4}, 224, "condensenet74", {"convolution": "sc", "groups": 1}, 4
    ),
    "ShuffleNet g=3": Network("shufflenet", {"groups": 3}, 224, "shufflenet", {"groups": 1}, 4),
    "G-ResNeXt50": Network("groupable_resnext50", {"gates": _half_open}, 224, "resnet50", {}, 2),
    "WRN-28-10-GC-2L N=8": Network(
        "wide_resnet28", {"convolution": "gc2l", "groups": 8}, 32, "wide_resnet28", {}, 4
    ),
    "IGC-L24M2": Network("igc_l24m2", {}, 32, "regconv", {"width": 18}, 16),
    "IGCV2*-C416": Network("igcv2_star", {}, 32, "regconv", {"width": 64}, 4),
}


@dataclass(frozen=True)
class Row:
    """One form of one network."""

    network: str
    direction: str
    form: str
    batch: int
    size: int
    parameters: int
    multiply_adds: int  # deployed, of the whole batch; of a training step those of the forward pass
    milliseconds: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    ours_is_faster: float  # this form's time over that of ours in the same round


# ---- the forms ----------------------------------------------------------------------------------


def build(network: Network) -> nn.Module:
    """The network as after its training: groups even but permuted, condensed."""
    torch.manual_seed(0)
    model = gc.models.create(network.model, **network.options)
    for seed, layer in enumerate(model.modules()):
        if isinstance(layer, gc.nn.FLGConv2d):
            ins, outs, groups = layer.in_channels, layer.out_channels, layer.groups
            even = ins % groups == 0 and outs % groups == 0
            if not even:
                raise ValueError(f"{layer} cannot have {groups} even groups")
            layer.reset_parameters(gc.Partition.random(ins, outs, groups, seed=seed))
    gc.models.condense(model)
    return model


def standard(network: Network) -> nn.Module:
    """What it replaces, of PyTorch's own layers."""
    torch.manual_seed(0)
    return plain(gc.models.create(network.standard, **network.standard_options))


def forward_forms(network: Network, device: str, compiles: bool) -> dict[str, nn.Module]:
    """Every form, in evaluation."""
    ours = build(network).eval()
    converted = gc.nn.convert(copy.deepcopy(ours))
    forms = {
        "ours": ours,
        "ours, converted": converted,
        "ours, folded": gc.nn.fold(gc.nn.take_over(copy.deepcopy(converted))),
        "plain": plain(converted),
        "plain, folded": fold_plain(plain(converted)),
        "unpermuted": plain(converted, permuted=False),
        "standard": standard(network).eval(),
    }
    forms = {name: form.to(device).eval() for name, form in forms.items()}
    if compiles:
        for whose in ("ours", "plain"):
            forms[f"{whose}, compiled"] = torch.compile(copy.deepcopy(forms[f"{whose}, folded"]))
    return forms


def training_forms(network: Network, device: str) -> dict[str, nn.Module]:
    """Every form, in training."""
    ours = build(network).train()
    forms = {
        "ours": ours,
        "plain": plain(ours),
        "unpermuted": plain(gc.nn.convert(copy.deepcopy(ours)), permuted=False),
        "standard": standard(network).train(),
    }
    return {name: form.to(device).train() for name, form in forms.items()}


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A training step, which changes nothing much: the rate is tiny, all the work is done."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return run


def call(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward pass."""

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def packages(
    forms: dict[str, nn.Module], x: torch.Tensor, folder: Path
) -> dict[str, Callable[[], object]]:
    """The folded networks as AOTInductor packages."""
    found: dict[str, Callable[[], object]] = {}
    for whose in ("ours", "plain"):
        with torch.no_grad():
            program = torch.export.export(forms[f"{whose}, folded"], (x,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / f"{whose}.pt2"),
            inductor_configs={"freezing": True},
        )
        package = torch._inductor.aoti_load_package(path)
        found[f"{whose}, packaged"] = partial(package, x)
    return found


def engines(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The plain network in ONNX Runtime and OpenVINO, each where it is installed."""
    found: dict[str, Callable[[], object]] = {}
    try:
        import onnxruntime  # noqa: PLC0415 (optional)
    except ImportError as error:
        print(f"without ONNX Runtime: {error}")
    else:
        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.getvalue(), options)
        feed = {session.get_inputs()[0].name: x.numpy()}
        found["ONNX Runtime"] = lambda: session.run(None, feed)
    try:
        import openvino  # noqa: PLC0415 (optional)
    except ImportError as error:
        print(f"without OpenVINO: {error}")
    else:
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor is fast at it
            "PERFORMANCE_HINT": "LATENCY",
        }
        converted = openvino.convert_model(model, example_input=x)
        compiled = openvino.Core().compile_model(converted, "CPU", config)
        found["OpenVINO"] = lambda: compiled(x.numpy())
    return found


# ---- measuring ----------------------------------------------------------------------------------


def waiting(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU a call is over when its work is."""
    if device != "cuda":
        return run

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


def measure(
    name: str, direction: str, chosen: argparse.Namespace, plan: Plan, folder: Path
) -> Iterable[Row]:
    network = NETWORKS[name]
    torch._dynamo.reset()
    device = chosen.device
    batch = (chosen.batch or network.batch) if direction == "training" else (chosen.batch or 1)
    torch.manual_seed(1)
    layout = LAYOUTS[chosen.layout]
    x = torch.randn(batch, 3, network.size, network.size).to(device, memory_format=layout)
    if direction == "training":
        forms = laid_out(training_forms(network, device), layout)
        check(forms["ours"], forms["plain"], x)
        calls = {form: step(model, x) for form, model in forms.items()}
    else:
        forms = laid_out(forward_forms(network, device, chosen.compile), layout)
        check(forms["ours"], forms["plain"], x)
        for form in ("ours, converted", "ours, folded", "plain, folded"):
            check(forms[form], forms["plain"], x)
        calls = {form: call(model, x) for form, model in forms.items()}
        if chosen.package:
            calls |= packages(forms, x, folder)
        if chosen.engines:
            calls |= engines(forms["plain"], x)
    timings = interleave({form: waiting(run, device) for form, run in calls.items()}, plan)
    reference = "ours" if direction == "training" else "ours, converted"
    counted = gc.count(build(network), network.size)
    replaced = gc.count(standard(network), network.size)
    for form, timing in timings.items():
        count = replaced if form == "standard" else counted
        yield row(name, direction, form, batch, network.size, count, timing, timings[reference])


def laid_out(forms: dict[str, nn.Module], layout: torch.memory_format) -> dict[str, nn.Module]:
    return {form: model.to(memory_format=layout) for form, model in forms.items()}


def row(
    name: str,
    direction: str,
    form: str,
    batch: int,
    size: int,
    count: gc.Count,
    timing: Timing,
    ours: Timing,
) -> Row:
    lower, upper = timing.quartiles
    return Row(
        network=name,
        direction=direction,
        form=form,
        batch=batch,
        size=size,
        parameters=count.parameters,
        multiply_adds=count.multiply_adds * batch,
        milliseconds=1e3 * timing.median,
        lower_quartile=1e3 * lower,
        upper_quartile=1e3 * upper,
        rounds=len(timing.samples),
        ours_is_faster=timing.times_slower_than(ours),
    )


def check(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Both compute the same function, or there is nothing to compare."""
    modes = ours.training, theirs.training
    with torch.inference_mode():
        found, expected = (model.eval()(x).float() for model in (ours, theirs))
    ours.train(modes[0])
    theirs.train(modes[1])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


# ---- what is left behind ------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """Two tables: forward passes and training steps, a line a network, a column a form.

    Ratios over ours as it is converted (as it trains, in training), and of the two folded forms.
    """
    parts = []
    for direction in dict.fromkeys(row.direction for row in rows):
        of = [row for row in rows if row.direction == direction]
        forms = list(dict.fromkeys(row.form for row in of))
        head = ["network", "N", "M multiply-adds", *(f"{form}, ms" for form in forms)]
        head += ["× plain", "× unpermuted", "× standard"]
        folded = {"ours, folded", "plain, folded"} <= set(forms)
        head += ["× plain, both folded"] if folded else []
        lines = [f"\n{direction}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in dict.fromkeys(row.network for row in of):
            by_form = {row.form: row for row in of if row.network == name}
            first = by_form["ours"]
            cells = [name, str(first.batch), f"{first.multiply_adds / 1e6:.0f}"]
            cells += [f"{by_form[f].milliseconds:.1f}" if f in by_form else "–" for f in forms]
            cells += [
                f"{by_form[form].ours_is_faster:.2f}"
                for form in ("plain", "unpermuted", "standard")
            ]
            if folded:
                both = by_form["plain, folded"], by_form["ours, folded"]
                cells.append(f"{both[0].milliseconds / both[1].milliseconds:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def table(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def earlier(folder: Path, conditions: dict[str, str]) -> list[Row]:
    """What a run before this one has left in the folder: other networks, the other direction."""
    path = folder / "networks.json"
    if not path.exists():
        return []
    left = json.loads(path.read_text())
    if left["conditions"].get("layout", "NCHW") != conditions["layout"]:
        raise SystemExit(f"{path} is of the other layout; choose another --out")
    return [Row(**row) for row in left["rows"]]


def leave(folder: Path, rows: list[Row], conditions: dict[str, str]) -> None:
    """Write what has been measured so far; a run that is cut off keeps its networks."""
    everything = {"conditions": conditions, "rows": [asdict(row) for row in rows]}
    write_whole(folder / "networks.json", json.dumps(everything, indent=1) + "\n")
    write_whole(folder / "networks.csv", table(rows))
    write_whole(folder / "networks.md", markdown(rows))
    try:
        from network_plot import draw  # noqa: PLC0415 (needs matplotlib, which is optional)
    except ImportError as error:
        print(f"no picture: {error}")
        return
    write_whole(folder / "networks.png", draw([asdict(row) for row in rows]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benches/networks.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="names that hold it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="NCHW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="default: 1, and a few in a training step")
    parser.add_argument("--train", action="store_true", help="training steps, not forward passes")
    parser.add_argument("--compile", action="store_true", help="compiled forms too; takes minutes")
    parser.add_argument("--package", action="store_true", help="AOTInductor packages too")
    parser.add_argument("--engines", action="store_true", help="ONNX Runtime and OpenVINO too")
    parser.add_argument("--seconds", type=float, default=10.0, help="for a network")
    parser.add_argument("--resume", action="store_true", help="only what --out does not have yet")
    parser.add_argument("--out", type=Path, default=Path("build/networks"))
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    torch._inductor.config.freezing = chosen.compile
    names = [n for n in NETWORKS if not chosen.only or any(text in n for text in chosen.only)]
    if not names:
        raise SystemExit(f"no network is called {chosen.only}; there are {list(NETWORKS)}")
    plan = Plan(seconds=chosen.seconds, least_rounds=5, most_rounds=51)
    direction = "training" if chosen.train else "forward"
    conditions = {**machine.conditions(chosen.threads), "layout": chosen.layout}
    if chosen.device == "cuda":
        conditions["gpu"] = torch.cuda.get_device_name()
    rows = earlier(chosen.out, conditions)
    if chosen.resume:
        done = {(row.network, row.direction) for row in rows}
        names = [name for name in names if (name, direction) not in done]
    for name in names:
        rows = [row for row in rows if (row.network, row.direction) != (name, direction)]
        with TemporaryDirectory() as folder:
            rows += measure(name, direction, chosen, plan, Path(folder))
        leave(chosen.out, rows, conditions)
        measured = [row for row in rows if (row.network, row.direction) == (name, direction)]
        print(markdown(measured), flush=True)


if __name__ == "__main__":
    main()
