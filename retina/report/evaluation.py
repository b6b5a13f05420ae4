"""`report.html` of an evaluation: what the detector finds, at which scores to use it, and where it fails."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina.data.images import MAX_PIXELS
from retina.evaluation.analysis import Analysis, describe, most_confused, rates
from retina.evaluation.confusion import confusion_matrix, overlaps
from retina.evaluation.curves import GRID, counts_over_thresholds, precision_curves
from retina.evaluation.metrics import RECALLS
from retina.files import make_folder, write_whole
from retina.report.charts import Line, chart, heat
from retina.report.gallery import KEY, figures, worst_images
from retina.report.html import Markup, embedded, join, number, page, percent, table, tag, text
from retina.report.look import SCRIPT, STYLE

MATRIX_CLASSES = 25
"""Classes up to which the whole confusion matrix is shown, and follows the slider."""
MAX_IMAGES, MAX_BYTES = 24, 3_500_000


class Origin(NamedTuple):
    """Where the numbers come from."""

    title: str
    command: str
    facts: Sequence[tuple[str, str]]
    """Names and values: weights, their hash, data, versions."""
    settings: str = ""
    warnings: Sequence[str] = ()
    """Of the data."""
    records: Sequence[Mapping[str, Any]] = ()
    """Of the run's `metrics.jsonl`."""


def write_report(
    file: Path, analysis: Analysis, metrics: Mapping[str, Any], origin: Origin, *, max_pixels: int = MAX_PIXELS
) -> None:
    """Raises OSError."""
    make_folder(file.parent)
    write_whole(file, build_report(analysis, metrics, origin, max_pixels=max_pixels))


def build_report(
    analysis: Analysis, metrics: Mapping[str, Any], origin: Origin, *, max_pixels: int = MAX_PIXELS
) -> bytes:
    """One HTML file that loads nothing. What it could not compute it says."""
    values = analysis.values
    sections = [
        tag("h1", origin.title),
        tag("p", " ".join(describe(values)), class_="lead"),
        _numbers(values, metrics),
        tag("h2", "At which score to use it"),
        _point(analysis),
        _controls(values["classes"]),
        _classes(values, metrics),
        tag("h2", "What it confuses"),
        _confusion(analysis),
        tag("h2", "Curves"),
        _curves(analysis),
        tag("h2", "What costs most"),
        _costs(values),
        _breakdown(values),
        tag("h2", "Images with most mistakes"),
        _gallery(analysis, max_pixels),
        *_training(origin.records),
        tag("h2", "Where this comes from"),
        _origin(origin, values),
        embedded(_data(analysis), "data"),
    ]
    return page(origin.title, tag("main", *sections), style=STYLE, script=SCRIPT)


def _numbers(values: dict[str, Any], metrics: Mapping[str, Any]) -> Markup:
    rows = []
    for key, meaning in (("AP", "mean over IoU 0.50 to 0.95"), ("AP50", "IoU 0.50"), ("AP75", "IoU 0.75")):
        rows.append((key, number(metrics[key], 3), _spread(values["intervals"]["overall"][key]), meaning))
    empty = values["images_without_objects"]
    share = f"{empty['with_false_alarms']} of {empty['images']}"
    rows.append(("empty images with false alarms", share, "", "at the operating point"))
    rows.append(("calibration error (ECE)", number(values["calibration"]["ece"], 3), "", "of scores as probabilities"))
    return table(("", "value", "95 % interval", ""), rows, f"{values['images']} images, {values['objects']} objects")


def _spread(estimate: Sequence[float] | None) -> str:
    return "-" if estimate is None else f"{estimate[1]:.3f} to {estimate[2]:.3f}"


def _point(analysis: Analysis) -> Markup:
    point, rows = analysis.values["operating_point"], analysis.values["at_the_point"]
    whole = rates(*(sum(row[key] for row in rows) for key in ("hits", "false_alarms", "objects")))
    alarms = whole["false_alarms"] / max(analysis.values["images"], 1)
    shown = [
        ("precision", percent(whole["precision"], 1), "precision"),
        ("recall", percent(whole["recall"], 1), "recall"),
        ("F1", number(whole["f1"], 3), "f1"),
        ("false alarms per image", number(alarms), "alarms"),
    ]
    parts = [tag("span", tag("strong", value, id=name), f" {label}  ") for label, value, name in shown]
    target = "" if point["target"] is None else f" {point['target']:g}"
    source = "fitted to these detections" if point["fitted_here"] else "stored in the weights"
    overall = point["overall"]
    promised = ", ".join(
        f"{name.replace('_', ' ')} {one[0]:.2f} ({one[1]:.2f} to {one[2]:.2f})" for name, one in overall.items() if one
    )
    promise = (
        f"Expected of new images, cross-fitted on {point['num_images']}: {promised or 'nothing that can be said'}."
    )
    pooled = [name for name, one in zip(analysis.values["classes"], point["classes"], strict=True) if one["pooled"]]
    few = f" Few objects, so the threshold of all classes together: {_some(pooled)}." if pooled else ""
    note = tag("p", f"Thresholds for {point['goal']}{target}, {source}. {promise}{few}", class_="soft")
    return tag("div", tag("p", *parts, aria_live="polite"), note, class_="panel")


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _controls(classes: Sequence[str]) -> Markup:
    options = [tag("option", "all classes", value="")]
    options += [tag("option", name, value=label) for label, name in enumerate(classes)]
    slider = tag("input", type="range", id="threshold", min=0, max=99, step=1, value=30, aria_label="score threshold")
    output = tag("output", "operating point", id="shown", for_="threshold")
    parts = [
        tag("label", "score threshold ", slider, output),
        tag("label", "of ", tag("select", *options, id="which", aria_label="classes that the threshold is of")),
        tag("button", "back to the operating point", type="button", id="back"),
    ]
    return tag("div", *parts, class_="panel controls live")


def _classes(values: dict[str, Any], metrics: Mapping[str, Any]) -> Markup:
    columns = ("class", "objects", "threshold", "found", "false", "missed", "precision", "recall", "F1", "AP", "AP50")
    names = ("threshold", "hits", "false", "missed", "precision", "recall", "f1")
    rows = []
    for label, (name, row) in enumerate(zip(values["classes"], values["at_the_point"], strict=True)):
        own = metrics["per_class"][name]
        spread = _spread(values["intervals"]["classes"][label]["AP"])
        texts = [f"{row['threshold']:.3f}", row["hits"], row["false_alarms"], row["missed"]]
        texts += [percent(row["precision"], 1), percent(row["recall"], 1), number(row["f1"], 3)]
        orders = [row["threshold"], row["hits"], row["false_alarms"], row["missed"]]
        orders += [_order(row[key]) for key in ("precision", "recall", "f1")]
        cells = [tag("th", name, scope="row"), tag("td", row["objects"], data_order=row["objects"])]
        for shown, order, column in zip(texts, orders, names, strict=True):
            cells.append(tag("td", shown, data_order=order, data_col=column))
        cells.append(tag("td", f"{number(own['AP'], 3)} ({spread})", data_order=_order(own["AP"])))
        cells.append(tag("td", number(own["AP50"], 3), data_order=_order(own["AP50"])))
        rows.append(tag("tr", *cells, data_label=label))
    head = tag("tr", *(tag("th", one, scope="col") for one in columns))
    inner = tag(
        "table", tag("caption", "Classes"), tag("thead", head), tag("tbody", *rows), id="classes", class_="sorts"
    )
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label="Classes")


def _order(value: float | None) -> float:
    return -1.0 if value is None else value


def _confusion(analysis: Analysis) -> Markup:
    names = analysis.values["classes"]
    pairs = most_confused(analysis.matrix, names)
    words = [f"{one} taken for {other}: {count}" for one, other, count in pairs]
    shown = tag("ul", *(tag("li", line) for line in words)) if words else tag("p", "No class is taken for another.")
    if len(names) > MATRIX_CLASSES:
        return join(
            [shown, tag("p", f"{len(names)} classes are too many for a matrix: see analysis.json.", class_="soft")]
        )
    stale = tag("p", "The matrix is that of the last common threshold.", id="stale", hidden=True, class_="soft")
    legend = (
        "Rows are what is there, columns what it was found as. The diagonal over the sum of its row is recall, over"
    )
    note = tag("p", f"{legend} the sum of its column precision.", class_="soft")
    return join([heat(analysis.matrix.tolist(), names, "confusion"), stale, note, shown])


def _curves(analysis: Analysis) -> Markup:
    outcomes, values = analysis.outcomes, analysis.values
    hits, false = (counts.sum(axis=0) for counts in counts_over_thresholds(outcomes))
    grid, objects = GRID.tolist(), values["objects"]
    rows = [rates(int(h), int(f), objects) for h, f in zip(hits, false, strict=True)]
    over = [
        Line(key, grid, [row[key] for row in rows], place) for place, key in enumerate(("precision", "recall", "f1"))
    ]
    curves = precision_curves(outcomes)
    defined = ~np.isnan(curves[0]).all(axis=1)
    drawn = [chart("All classes together", over, "score threshold", "share")]
    if defined.any():
        parts = {"IoU 0.50": curves[0], "IoU 0.75": curves[5], "mean of 0.50 to 0.95": curves.mean(axis=0)}
        lines = [
            Line(name, RECALLS.tolist(), part[defined].mean(axis=0).tolist(), place)
            for place, (name, part) in enumerate(parts.items())
        ]
        drawn.append(chart("Precision over recall, mean of classes", lines, "recall", "precision"))
    bins = [one for one in values["calibration"]["bins"] if one["count"]]
    if bins:
        own = Line("measured", [one["score"] for one in bins], [one["right"] for one in bins])
        drawn.append(
            chart("Are scores probabilities?", [own, Line("ideal", [0, 1], [0, 1], 3)], "score", "share right")
        )
    return tag("div", *drawn, class_="figures")


def _costs(values: dict[str, Any]) -> Markup:
    words = {
        "classification": "right place, wrong class",
        "localisation": "right class, IoU of 0.1 to 0.5",
        "both": "wrong class, IoU of 0.1 to 0.5",
        "duplicate": "an object found twice",
        "background": "nothing there",
        "missed": "objects that nothing was near",
    }
    rows = [
        (kind, (one["count"], one["count"]), (_points(one["ap50"]), _order(one["ap50"])), words[kind])
        for kind, one in values["errors"].items()
    ]
    caption = "Kinds of errors (TIDE), of all detections, and the AP50 that each costs"
    return table(("error", "number", "AP50 lost", "meaning"), rows, caption, class_="sorts")


def _points(cost: float | None) -> str:
    return "-" if cost is None else f"{100 * cost:.1f} points"


def _breakdown(values: dict[str, Any]) -> Markup:
    rows = [
        (row["group"], (row["objects"], row["objects"]), percent(row["recall"], 1), number(row["ap"], 3))
        for group in values["breakdown"].values()
        for row in group
    ]
    return table(
        ("objects that are", "objects", "found at the operating point", "AP"), rows, "By size, shape, crowding"
    )


def _gallery(analysis: Analysis, max_pixels: int) -> Markup:
    worst = worst_images(analysis, MAX_IMAGES)
    shots = list(figures(analysis, images=worst, max_bytes=MAX_BYTES, max_pixels=max_pixels))
    if not shots:
        return tag("p", "No image with a mistake could be shown.")
    classes = [tag("option", "all", value="")]
    classes += [tag("option", name, value=label) for label, name in enumerate(analysis.values["classes"])]
    kinds = {"": "everything", "hit": "found", "miss": "missed", "false": "false alarms"}
    kinds |= {kind: f"false alarms: {kind}" for kind in list(analysis.values["errors"])[:-1]}
    options = [tag("option", words, value=kind) for kind, words in kinds.items()]
    filters = [
        tag("label", "class ", tag("select", *classes, id="of")),
        tag("label", "show ", tag("select", *options, id="kind")),
    ]
    nothing = tag("p", "No image here has any.", id="none", hidden=True)
    key = tag("p", KEY, class_="key")
    return join(
        [key, tag("div", *filters, class_="panel controls live"), nothing, tag("div", *shots, class_="gallery")]
    )


def _training(records: Sequence[Mapping[str, Any]]) -> list[Markup]:
    series = {
        "Loss": {"training": ("train", "loss"), "validation": ("val", "loss")},
        "AP": {name: ("val", name) for name in ("AP", "AP50", "AP75")},
        "Learning rate": {"rate": ("train", "lr")},
    }
    drawn = []
    for title, curves in series.items():
        lines: list[Line] = []
        for name, (kind, key) in curves.items():
            points = [(r["step"], r[key]) for r in records if r.get("kind") == kind and _is_number(r.get(key))]
            if points:
                lines.append(Line(name, [step for step, _ in points], [value for _, value in points], len(lines)))
        if lines:
            last = max(max(line.x) for line in lines)
            top = 1.0 if title == "AP" else max(max(value or 0 for value in line.y) for line in lines) or 1.0
            drawn.append(
                chart(title, lines, "step", title.lower(), x_range=(0.0, float(last or 1)), y_range=(0.0, float(top)))
            )
    return [tag("h2", "Training"), tag("div", *drawn, class_="figures")] if drawn else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _origin(origin: Origin, values: dict[str, Any]) -> Markup:
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in origin.facts]
    made = tag("p", "Made by ", tag("code", origin.command))
    note = (
        f"Intervals: {values['intervals']['images_drawn']} resamples of the images. A detection is right when it takes"
    )
    how = tag("p", f"{note} an object of its class at IoU 0.5, by COCO's rules.", class_="soft")
    facts = tag(
        "div", tag("table", tag("tbody", *rows)), class_="wide", tabindex="0", role="region", aria_label="Origin"
    )
    parts = [made, facts, how]
    if origin.warnings:
        lines = tag("ul", *(tag("li", line) for line in origin.warnings))
        parts.append(tag("details", tag("summary", f"{len(origin.warnings)} warnings about the data"), lines))
    if origin.settings:
        settings = Markup("\n".join(text(line) for line in origin.settings.splitlines()))
        parts.append(tag("details", tag("summary", "Settings of the run"), tag("pre", settings)))
    return join(parts)


def _data(analysis: Analysis) -> dict[str, Any]:
    """What the script counts from."""
    outcomes, rows = analysis.outcomes, analysis.values["at_the_point"]
    hits, false = counts_over_thresholds(outcomes)
    values: dict[str, Any] = {
        "images": analysis.values["images"],
        "objects": [row["objects"] for row in rows],
        "thresholds": analysis.thresholds.tolist(),
        "hits0": [row["hits"] for row in rows],
        "false0": [row["false_alarms"] for row in rows],
        "hits": hits.tolist(),
        "false": false.tolist(),
        "matrix0": None,
        "matrices": None,
    }
    if len(rows) <= MATRIX_CLASSES:
        pairs = overlaps(outcomes)
        values["matrix0"] = analysis.matrix.tolist()
        values["matrices"] = [
            confusion_matrix(outcomes, outcomes.scores >= limit, pairs).tolist() for limit in GRID.tolist()
        ]
    return values
