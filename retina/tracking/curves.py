"""`curves.png`: what the records of a run look like over its steps."""

import io
from pathlib import Path

from retina.files import read_plain, write_whole
from retina.schema import parse_json

PANELS = {
    "loss": {
        "training": ("train", "loss"),
        "classification": ("train", "loss_classification"),
        "boxes": ("train", "loss_box"),
        "validation": ("val", "loss"),
    },
    "learning rate": {"rate": ("train", "lr")},
    "AP": {name: ("val", name) for name in ("AP", "AP50", "AP75")},
}
"""Each panel's curves: kind and name of the records they show."""


def draw_curves(folder: Path) -> None:
    """Reads `metrics.jsonl` of the run and writes `curves.png`. Without any records there is nothing to draw, and
    nothing is written. Raises OSError."""
    file = folder / "metrics.jsonl"
    records = [parse_json(line) for line in read_plain(file).splitlines()] if file.exists() else []
    if not records:
        return
    from matplotlib.figure import Figure  # slow to import, and without its own windows and global state

    figure = Figure(figsize=(11, 3.2))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.16, top=0.9)  # a layout that is computed draws all twice
    for axes, (title, curves) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for label, (kind, name) in curves.items():
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if kind == "val" else None, markersize=3)
        axes.set(title=title, xlabel="step", ylim=(0, 1 if title == "AP" else None))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(folder / "curves.png", content.getvalue())
