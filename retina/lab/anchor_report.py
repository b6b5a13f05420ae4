"""What the anchors lab shows: text, a picture and a config group."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from retina.errors import plain
from retina.lab.coverage import Coverage, Objects, Pyramid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = {
    "best IoU": ("best_iou", "{:.3f}"),
    "recall": ("recall_at_threshold", "{:.1%}"),
    "positives": ("positives", "{:.1f}"),
    "none": ("without_positive", "{:.1%}"),
    "none *": ("without_positive_at_threshold", "{:.1%}"),
}
_MOST_DOTS = 4000
_MOST_CLASSES = 20  # on the screen: those with most objects
_FEWEST = 10  # objects of a size that a point is drawn for


def model_section(pyramid: Pyramid) -> dict[str, Any]:
    """The settings of `model` that the anchors are made of."""
    numbers = {f"anchor_{name}": list(getattr(pyramid.anchors, name)) for name in ("sizes", "scales", "ratios")}
    return {"levels": pyramid.levels, **numbers}


def yaml_file(model: Mapping[str, Any], result: Mapping[str, Any], name: str) -> str:
    """A whole config group: the model's settings, with the fitted anchors, and where they come from."""
    fitted, data = result["fitted"]["model"], result["data"]
    now, then = (result[which]["coverage"]["best_iou"] for which in ("now", "fitted"))
    words = " ".join(f"model.{key}=[{','.join(f'{number:g}' for number in one)}]" for key, one in fitted.items())
    header = [
        f"Anchors fitted to {data['objects']:,} objects by tools/lab.py:",
        f"  {result['command']}",
        f"Data: {plain(data['annotations'])}",
        f"Mean best IoU of all objects: {now:.3f} -> {then:.3f}",
        f"{result['verdict']}",
        f"Use it as model={name}; with an experiment that has a model section of its own, which comes after this one:",
        f"  {words}",
    ]
    section = yaml.safe_dump({**model, **fitted}, default_flow_style=None, sort_keys=False, width=120)
    return "".join(f"# {line}\n" for line in header) + section


def describe(result: Mapping[str, Any]) -> str:
    """What the screen shows: every number as it is now and, if any were fitted, as those anchors would have it."""
    shown = [which for which in ("now", "fitted") if which in result]
    coverages = [result[which]["coverage"] for which in shown]
    now = coverages[0]
    by_count = sorted(now["by_class"], key=lambda name: -now["by_class"][name]["objects"])
    levels = sorted({name for coverage in coverages for name in coverage["by_level"]})
    groups = {"all": coverages}
    for kind, names in (("by_size", now["by_size"]), ("by_class", by_count[:_MOST_CLASSES]), ("by_level", levels)):
        prefix = "best on " if kind == "by_level" else ""
        groups |= {f"{prefix}{plain(name)}": [coverage[kind].get(name) for coverage in coverages] for name in names}
    width = max(map(len, groups))
    lines = [
        f"{result['data']['objects']:,} objects of {result['data']['images']:,} images after the resize; "
        f"positives from {now['objects_matched']:,} of them."
        + (" Each number as it is -> as fitted." if len(shown) > 1 else ""),
        f"{'':<{width}}{'objects':>10}" + "".join(f"{title:>18}" for title in _COLUMNS),
    ]
    for name, group in groups.items():
        cells = [" -> ".join(_cell(numbers, *column) for numbers in group) for column in _COLUMNS.values()]
        count = next(numbers["objects"] for numbers in group if numbers)
        lines.append(f"{name:<{width}}{count:>10,}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(
        f"recall: at IoU {result['threshold']:g}. none: objects without any positive anchor; *: or of less IoU only\n"
    )
    if result["trials"]:
        lines.append("fitted from, and judged on images not fitted to:")
        for trial in result["trials"]:
            gains = (trial["best_iou"], trial["recall_at_threshold"])
            iou, recall = (f"{one['gain']:+.3f} ± {one['noise']:.3f}" for one in gains)
            lines.append(f"  P{trial['levels'][0]}: {trial['anchors']:>9,} anchors, best IoU {iou}, recall {recall}")
        lines.append("")
    for which in shown:
        levels, *rest = result[which]["model"].items()
        numbers = (f"{key.removeprefix('anchor_')} {[float(f'{n:.4g}') for n in values]}" for key, values in rest)
        lines.append(f"{which:<7} from P{levels[1][0]}: {', '.join(numbers)}")
    return "\n".join([*lines, result["verdict"], *(f"note: {note}" for note in result["notes"])])


def _cell(numbers: Mapping[str, Any] | None, key: str, shape: str) -> str:
    value = numbers.get(key) if numbers else None
    return "-" if value is None else shape.format(value)


def draw(objects: Objects, pyramids: Mapping[str, Pyramid], coverages: Mapping[str, Coverage]) -> "Figure":
    """Objects and anchors by width and height, one panel per pyramid; and how well objects of each size fare."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.7 * (len(pyramids) + 1), 5.6), layout="constrained")
    *panels, last = figure.subplots(1, len(pyramids) + 1, width_ratios=(*(1 for _ in pyramids), 1.15))
    rows = torch.randperm(len(objects.boxes), generator=torch.Generator().manual_seed(0))[:_MOST_DOTS]
    sides = objects.sides()[rows]
    shapes = {name: pyramid.shapes() for name, pyramid in pyramids.items()}
    numbers = torch.cat([sides, *(of_pyramid.flatten(0, 1) for of_pyramid in shapes.values())])
    for panel, (name, pyramid) in zip(panels, pyramids.items(), strict=True):
        best = coverages[name].best()
        colours = {"cmap": "RdYlGn", "vmin": 0.2, "vmax": 0.9, "alpha": 0.7}
        dots = panel.scatter(*sides.T, c=best[rows], s=7, linewidths=0, **colours)
        for level, anchors, marker in zip(pyramid.levels, shapes[name], itertools.cycle("osD^vPX"), strict=False):
            panel.plot(*anchors.T, marker, mfc="none", mec="black", ms=7, mew=1.3, label=f"anchors of P{level}")
        panel.set(xlabel="width in pixels", ylabel="height in pixels", aspect="equal")
        panel.set_title(f"{name}: mean best IoU {best.mean():.3f}")
        _octaves(panel, "xy", float(numbers.min()) / 1.2, float(numbers.max()) * 1.2)
        panel.legend(loc="upper left", fontsize="small")
    figure.colorbar(dots, ax=panels[-1], label="best IoU of an object")
    _draw_by_size(last, objects, coverages)
    return figure


def _octaves(axes: "Axes", names: str, low: float, high: float) -> None:
    """Powers of two along these axes, as strides and sizes are."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log", base=2)
        getattr(axes, f"set_{name}lim")(low, high)
        getattr(axes, f"{name}axis").set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _draw_by_size(axes: "Axes", objects: Objects, coverages: Mapping[str, Coverage]) -> None:
    """Half octaves of size: objects as bars; mean best IoU and recall as lines."""
    place = (2 * objects.size().log2()).floor().long()
    first, last = int(place.min()), int(place.max())
    edges = 2 ** (np.arange(first, last + 2) / 2)
    counts = np.bincount(place - first, minlength=last - first + 1)
    axes.stairs(counts / counts.max(), edges, fill=True, color="0.88", label="objects (share of the fullest bar)")
    middles, enough = np.sqrt(edges[:-1] * edges[1:]), counts >= min(_FEWEST, counts.max())
    for colour, (name, coverage) in zip(("tab:orange", "tab:blue"), coverages.items(), strict=False):
        best = coverage.best().numpy()
        for style, what, values in (("o-", "mean best IoU", best), ("s--", "recall at 0.5", best >= 0.5)):
            mean = np.bincount(place - first, values, minlength=len(counts))[enough] / counts[enough]
            axes.plot(middles[enough], mean, style, color=colour, ms=4, label=f"{name}: {what}")
    _octaves(axes, "x", edges[0], edges[-1])
    axes.set(ylim=(0, 1.04), xlabel="size in pixels (square root of the area)", title="by size")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize="small")
