"""A detector as a folder for Hugging Face's hub: the weights, what they are, and a model card made from the run."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from retina import __version__
from retina.evaluation.operating_points import describe
from retina.model.weights import DetectorCard

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def folder_files(
    weights: bytes,
    card: DetectorCard,
    *,
    name: str,
    license: str | None,
    data: Mapping[str, Any],
    analysis: Mapping[str, Any],
) -> dict[str, bytes]:
    """The contents of the files by name.

    weights: a weights file of this program, header included.
    data: the `data` section of the run's settings; may be empty.
    analysis: what `analysis.json` of its evaluation says; may be empty."""
    config = {
        "library_name": "retina-detect",
        "model_type": "retinanet",
        "id2label": {str(label): class_name for label, class_name in enumerate(card.classes)},
        "label2id": {class_name: label for label, class_name in enumerate(card.classes)},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "preprocessing": card.preprocessing,
        "postprocess": card.postprocess,
        "thresholds": [one["threshold"] for one in card.operating_point.get("classes", [])],
        "versions": {"retina": __version__} | {k: v for k, v in card.environment.items() if isinstance(v, str)},
    }
    readme = model_card(card, name=name, license=license, data=data, analysis=analysis)
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2) + "\n").encode(), README: readme.encode()}


def model_card(
    card: DetectorCard, *, name: str, license: str | None, data: Mapping[str, Any], analysis: Mapping[str, Any]
) -> str:
    """In Markdown, with the front matter that the hub reads. Says what was measured and nothing else."""
    sides = f"short side {card.preprocessing['short_side']}, long side at most {card.preprocessing['long_side']}"
    tile = card.preprocessing.get("tile")
    lines = [
        "---",
        f"license: {license or 'unknown'}",
        "library_name: retina-detect",
        "pipeline_tag: object-detection",
        "tags: [object-detection, retinanet]",
        "---",
        "",
        f"# {_text(name)}",
        "",
        f"A one-stage detector (RetinaNet family, backbone {_text(str(card.model['backbone']))}) of "
        f"{len(card.classes)} classes: {', '.join(map(_text, card.classes))}.",
        "",
        f"Images are resized to {sides} pixels" + (f", in tiles of {tile[0]} x {tile[1]}." if tile else "."),
        "",
        "## Data",
        "",
        f"Trained on the data set `{_text(str(data.get('name', 'unknown')))}`, {card.step} steps."
        + (f" Evaluated on {analysis['images']} images with {analysis['objects']} objects." if analysis else ""),
        "",
        "## Metrics",
        "",
        *_metrics(card, analysis),
        "",
        "## Operating points",
        "",
        *_points(card),
        "",
        "## How to run",
        "",
        "```python",
        "import retina  # pip install retina-detect",
        "",
        'detector = retina.load("FOLDER")  # with these files',
        'for found in detector.predict(["a.jpg"]):',
        "    print(found.boxes, found.scores, [detector.classes[k] for k in found.labels])",
        "```",
        "",
    ]
    return "\n".join(lines)


def _metrics(card: DetectorCard, analysis: Mapping[str, Any]) -> list[str]:
    if not card.metrics:
        return ["None were measured."]
    intervals = (analysis.get("intervals") or {}).get("overall") or {}
    lines = ["| metric | value | 95 % interval over images |", "|---|---|---|"]
    for name in _METRICS:
        if (value := card.metrics.get(name)) is not None:
            low_high = intervals.get(name)
            shown = f"{low_high[1]:.3f} to {low_high[2]:.3f}" if low_high and len(low_high) == 3 else "-"
            lines.append(f"| {name} | {value:.3f} | {shown} |")
    return lines


def _points(card: DetectorCard) -> list[str]:
    if not card.operating_point:
        return [f"None: scores above {card.postprocess.get('score_threshold', 0.05)} are returned."]
    return ["```", *map(_text, describe(card.operating_point, card.classes)), "```"]


def _text(text: str) -> str:
    """What cannot end the Markdown it stands in."""
    return " ".join(text.replace("`", "'").replace("<", "&lt;").split()) if "\n" in text or "`" in text else text
