"""The page about a network: one file of HTML that needs no other."""

from __future__ import annotations

from html import escape
from importlib import resources

from .. import bench
from .measure import Inspection, Layer
from .pictures import mask_pictures

__all__ = ["page"]

HEAD = (
    "layer",
    "kind",
    "reads → writes",
    "groups, as numbered and sorted",
    "parameters",
    "after",
    "M multiply-adds",
    "after",
    "ms",
    "after",
    "GFLOP/s after",
)
TEXT_COLUMNS = 4


HOW_TO_READ = """<p class="wide">Before conversion a layer that learns its groups holds a dense
weight and hides what its groups leave out; parameters and multiply-adds before are those of the
dense weight, without logits and gates. The left picture of a layer has its inputs from left to
right and its outputs from top to bottom, dark where they are connected; in the right one both are
sorted by group. Times are medians over rounds in which both forms run in turn, taken around each
layer's call; the whole network is timed by itself and includes normalisation, activations and
pooling.</p>"""


def page(found: Inspection) -> str:
    """The page."""
    css = resources.files(bench).joinpath("page.css").read_text(encoding="utf-8")
    own = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    size = " × ".join(map(str, found.input_size))
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>groupconv inspect: {escape(found.title)}</title>
<style>
{css}{own}</style>
<h1>{escape(found.title)}</h1>
<p class="soft wide">One image of {size}; before and after <code>gc.nn.convert</code>.</p>
{_summary(found)}
<h2>Layers</h2>
<div class="scroll">{_layers(found)}</div>
<h2>How to read it</h2>
{HOW_TO_READ}
<h2>Conditions</h2>
<dl>{_conditions(found)}</dl>
</html>
"""


def _summary(found: Inspection) -> str:
    counted = found.counted
    rows = (
        ("parameters", f"{counted.dense_parameters:,}", f"{counted.parameters:,}"),
        ("multiply-adds", f"{counted.dense_multiply_adds:,}", f"{counted.multiply_adds:,}"),
        ("milliseconds", f"{found.before_ms:.2f}", f"{found.after_ms:.2f}"),
    )
    body = "".join(
        f"<tr><td class=text>{what}</td><td>{before}</td><td>{after}</td></tr>"
        for what, before, after in rows
    )
    head = "<tr><th></th><th>before</th><th>after</th></tr>"
    return f"<table class=summary><thead>{head}</thead><tbody>{body}</tbody></table>"


def _layers(found: Inspection) -> str:
    most = max((max(layer.before_ms, layer.after_ms) for layer in found.layers), default=0.0)
    head = "".join(
        f"<th {'class=text' if at < TEXT_COLUMNS else ''}>{name}</th>"
        for at, name in enumerate(HEAD)
    )
    body = "\n".join(_row(layer, most) for layer in found.layers)
    rest = _rest(found)
    return (
        f"<table class=layers><thead><tr>{head}</tr></thead><tbody>{body}\n{rest}</tbody></table>"
    )


def _row(layer: Layer, most: float) -> str:
    counted = layer.counted
    rate = 2e-6 * counted.multiply_adds / layer.after_ms if layer.after_ms else 0.0
    cells = (
        escape(counted.name),
        escape(counted.layer),
        f"{_shape(counted.input)} → {_shape(counted.output)}",
        _groups(layer),
        _number(counted.dense_parameters),
        _number(counted.parameters),
        f"{counted.dense_multiply_adds / 1e6:.2f}",
        f"{counted.multiply_adds / 1e6:.2f}",
        _bar(layer.before_ms, most, "before"),
        _bar(layer.after_ms, most, "after"),
        f"{rate:.0f}",
    )
    return (
        "<tr>"
        + "".join(
            f"<td{' class=text' if at < TEXT_COLUMNS else ''}>{cell}</td>"
            for at, cell in enumerate(cells)
        )
        + "</tr>"
    )


def _rest(found: Inspection) -> str:
    """Whatever is neither: the whole less what the layers take."""
    before = found.before_ms - sum(layer.before_ms for layer in found.layers)
    after = found.after_ms - sum(layer.after_ms for layer in found.layers)
    return (
        "<tr class=rest><td class=text colspan=8>normalisation, activations, pooling and calls: "
        f"the whole network less its layers</td><td>{max(before, 0):.2f}</td>"
        f"<td>{max(after, 0):.2f}</td><td></td></tr>"
    )


def _groups(layer: Layer) -> str:
    parts = []
    for name, partition in layer.partitions.items():
        numbered, ordered = mask_pictures(partition)
        said = f"{partition.groups} group{'s' if partition.groups > 1 else ''}"
        label = escape(f"{name}: {said}" if name else said)
        title = escape(repr(partition))
        parts.append(
            f"<figure title='{title}'><img alt='' src='{numbered}'> <img alt='' src='{ordered}'>"
            f"<figcaption>{label}</figcaption></figure>"
        )
    return "".join(parts)


def _bar(milliseconds: float, most: float, kind: str) -> str:
    share = 100 * milliseconds / most if most else 0.0
    return f"<span class='bar {kind}' style='--share:{share:.1f}%'>{milliseconds:.3f}</span>"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _number(value: int) -> str:
    return f"{value:,}"


def _conditions(found: Inspection) -> str:
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in found.conditions.items()
    )
