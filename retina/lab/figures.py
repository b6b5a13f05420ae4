"""Figures without a screen, written whole; and those of a detector's elements."""

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.errors import ConfigError, plain
from retina.files import make_folder, read_plain, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_MARK = "retina tools/lab.py"
KINDS = ("positives", "negatives")
MOST_PANELS = 8
"""Classes, the rarest, that have cumulative curves in a figure."""


def check_format(output: Path, key: str) -> None:
    """Raises ConfigError for a file that is neither PNG nor SVG, or is there and no figure of the lab."""
    if output.suffix not in FORMATS:
        problem = f"{output} is of no known format - end it in {' or '.join(FORMATS)}"
        raise ConfigError(problem, code="bad-name", key=key)
    if os.path.lexists(output) and not (output.is_file() and _MARK.encode() in read_plain(output)):
        problem = f"{output} is there already and is no figure of the lab - choose another file"
        raise ConfigError(problem, code="output-taken", key=key)


def check_folder(folder: Path, key: str) -> None:
    """Raises ConfigError for a folder that cannot be made or written into. Leaves nothing behind."""
    try:
        with tempfile.TemporaryDirectory(dir=next(place for place in (folder, *folder.parents) if place.exists())):
            return
    except OSError as fault:
        problem = f"{folder} cannot be written ({fault.strerror}) - choose another folder"
        raise ConfigError(problem, code="not-written", key=key) from None


def save(figure: "Figure", output: Path) -> None:
    """PNG or SVG, by the suffix; the same figure makes the same bytes. Raises OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    marks: dict[str, str | None] = {"Software": _MARK} if output.suffix == ".png" else {"Creator": _MARK, "Date": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "retina"}):
        figure.savefig(buffer, format=output.suffix[1:], dpi=150, metadata=marks)
    make_folder(output.parent)
    write_whole(output, buffer.getvalue())


def draw_cumulative(result: Mapping[str, Any]) -> "Figure":
    """As the paper's Figure 4: the loss that the easiest elements have together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
        of = result[kind]["all"]
        _curves(axes, result["shares"], of)
        axes.set(xlabel=f"share of {kind}, easiest first", ylabel="cumulative normalised loss")
        axes.set_title(f"{of['elements']:,} {kind}", fontsize="medium")
        axes.legend(loc="upper left")
    return figure


def draw_cumulative_by(result: Mapping[str, Any], by: str) -> "Figure":
    """The same of each pyramid level, or of the classes with fewest positives, rarest first: one column each.

    The axis of the negatives is logarithmic towards its end, where their loss is."""
    from matplotlib.figure import Figure

    names = list(result["negatives"][by])
    if by == "class":
        names = sorted(names, key=lambda name: result["positives"][by][name]["elements"])[:MOST_PANELS]
    figure = Figure(figsize=(1.6 + 2.3 * len(names), 5.6), layout="constrained")
    rows = figure.subplots(2, len(names), sharex="row", sharey=True, squeeze=False)
    for row, kind in zip(rows, KINDS, strict=True):
        for axes, name in zip(row, names, strict=True):
            of = result[kind][by][name]
            axes.set_title(f"{plain(name)}: {of['elements']:,}", fontsize="medium")
            if of["elements"]:
                _curves(axes, [share if kind == "positives" else 1 - share for share in result["shares"]], of)
            else:
                axes.text(0.5, 0.5, f"no {kind}", ha="center", color="0.4")
        row[0].set_ylabel(f"{kind}\ncumulative normalised loss")
    rows[0][0].set(xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
    rows[1][0].set(xscale="log", xlim=(1, 1e-4))  # of what is left
    rows[1][0].set(xticks=(1, 0.1, 0.01, 0.001), xticklabels=("0", "0.9", "0.99", "0.999"))
    rows[1][0].minorticks_off()
    figure.supxlabel("share of the elements, easiest first", fontsize="medium")
    figure.legend(*rows[1][0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _curves(axes: "Axes", shares: list[float], of: Mapping[str, Any]) -> None:
    """One for each gamma."""
    for gamma in (key for key in of if key.startswith("gamma ")):
        axes.plot(shares, of[gamma]["cumulative"], label=gamma.replace(" ", " = "))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)


def draw_hardest(result: Mapping[str, Any]) -> "Figure":
    """The share of the loss that the hardest 1 % and 10 % of the elements carry, by class and by level."""
    from matplotlib.figure import Figure

    heights = [max(len(result["positives"][by]), 3) for by in ("class", "level")]
    figure = Figure(figsize=(15, 1.9 + 0.24 * sum(heights)), layout="constrained")
    rows = figure.subplots(2, 4, sharex=True, squeeze=False, height_ratios=heights)
    columns = [(kind, percent) for kind in KINDS for percent in (1, 10)]
    for row, by in zip(rows, ("class", "level"), strict=True):
        for axes, (kind, percent) in zip(row, columns, strict=True):
            groups = {plain(name): of for name, of in result[kind][by].items() if of["elements"]}
            for gamma in (key for key in result[kind]["all"] if key.startswith("gamma ")):
                shares = [of[gamma][f"hardest_{percent}_percent"] for of in groups.values()]
                axes.plot(shares, range(len(groups)), "o", label=gamma.replace(" ", " = "), alpha=0.8)
            labels = [f"{name} ({of['elements']:,})" for name, of in groups.items()] if percent == 1 else None
            axes.set_yticks(range(len(groups)), labels or [""] * len(groups), fontsize="small")
            axes.set(xlim=(-0.02, 1.02), ylim=(len(groups) - 0.5, -0.5))
            axes.set_title(f"{kind} by {by}: hardest {percent} %", fontsize="medium")
            axes.grid(alpha=0.3)
    figure.supxlabel("share of the loss that they carry", fontsize="medium")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure
