"""Reports are one file that says everything without a script, holds names as text, and lets nothing in or out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retina.data.annotations import Annotations, offsets_of
from retina.evaluation.analysis import Analysis, analyze
from retina.evaluation.metrics import coco_metrics
from retina.report.evaluation import Origin, build_report
from retina.report.html import embedded, tag
from scenes import annotations_of, detections_of, random_scene

HOSTILE = ['</script><script>alert("1")</script>', '"><img src=x onerror=alert(2)>', "a\u202eb \x1b[31m &lt;b&gt;"]


def with_images(annotations: Annotations, folder: Path, names: list[str] | None = None) -> Annotations:
    from dataclasses import replace

    stated = names or [f"{image}.jpg" for image in range(len(annotations))]
    encoded = [name.encode() for name in stated]
    for name in stated:
        if "/" not in name:
            Image.new("RGB", (200, 200), (90, 120, 90)).save(folder / name, "JPEG")
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    lengths = offsets_of(np.array([len(name) for name in encoded]))
    return replace(annotations, image_root=folder, names=joined, name_offsets=lengths)


def build(annotations: Annotations, detections: Any, **options: Any) -> tuple[Analysis, str]:
    metrics = coco_metrics(annotations, detections)
    analysis = analyze(annotations, detections, metrics, draws=20)
    origin = Origin("Evaluation of <run>", "eval.py x=<1>", [("weights", "a & b")], **options)
    return analysis, build_report(analysis, metrics, origin).decode()


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    from dataclasses import replace

    annotations, detections = random_scene(0)
    annotations = replace(annotations, classes=tuple(HOSTILE))
    annotations = with_images(annotations, tmp_path, [f"<b onclick=x>{image}.jpg" for image in range(len(annotations))])
    warnings = ["<script>3</script>"]
    _, page = build(annotations, detections, settings="<script>4</script>", warnings=warnings)
    tags = Tags(page)
    scripts = [attributes for name, attributes in tags.seen if name == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not any(key.startswith("on") for _, attributes in tags.seen for key in attributes)
    assert {name for name, _ in tags.seen} & {"b", "iframe", "object", "link", "form", "a"} == set()
    images = [attributes["src"] or "" for name, attributes in tags.seen if name == "img"]
    assert len(images) > 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    text = "".join(tags.words)
    assert 'alert("1")' in text
    assert "\u202e" not in page
    assert "\x1b" not in page


def test_nothing_is_loaded_and_no_other_script_may_run(tmp_path: Path) -> None:
    annotations, detections = random_scene(0)
    _, page = build(with_images(annotations, tmp_path), detections)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#x27;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].startswith("'sha256-")
    assert "unsafe" not in policy[1]
    assert not re.search(r'(src|href|url\()\s*=?\s*"?https?:', page)
    assert "style=" not in page


def test_the_essentials_need_no_script(tmp_path: Path) -> None:
    annotations, detections = random_scene(0)
    analysis, page = build(with_images(annotations, tmp_path), detections)
    text = "".join(Tags(page).words)
    for name, row in zip(annotations.classes, analysis.values["at_the_point"], strict=True):
        assert name in text
        assert f"{100 * row['precision']:.1f} %" in text
        assert f"{100 * row['recall']:.1f} %" in text
    assert "Evaluation of <run>" in text
    shown = [a for name, a in Tags(page).seen if name == "g" and "data-kind" in a and "hidden" not in a]
    assert {a["data-kind"] for a in shown} == {"hit", "miss", "false"}


def test_images_outside_of_the_folder_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.jpg")
    annotations = annotations_of([(0, 0, [1.0, 1.0, 9.0, 9.0])], 1, ["a"])
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        _, page = build(with_images(annotations, tmp_path / "images", [name]), detections_of([]))
        assert "<img" not in page


@pytest.mark.parametrize("num_classes", [1, 30])
def test_little_or_much_to_say_is_a_page(num_classes: int) -> None:
    classes = [f"class {label}" for label in range(num_classes)]
    for objects in ([], [(0, 0, [1.0, 1.0, 20.0, 20.0])]):
        _, page = build(annotations_of(objects, 1, classes), detections_of([]))
        assert page.endswith("</html>\n")
        content = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
        assert content
        assert len(json.loads(content[1])["objects"]) == num_classes


def test_records_of_the_run_are_drawn(tmp_path: Path) -> None:
    annotations, detections = random_scene(0)
    records = [{"kind": "train", "step": step, "loss": 1.0 / (step + 1)} for step in range(5)]
    records += [{"kind": "val", "step": 4, "AP": 0.5, "loss": None}, {"kind": "val", "step": 5, "AP": float("nan")}]
    _, page = build(annotations, detections, records=records)
    assert page.count("<figcaption>Loss</figcaption>") == 1


def test_markup_is_escaped_once() -> None:
    assert tag("p", "<&>", tag("b", '"'), title='"') == '<p title="&quot;">&lt;&amp;&gt;<b>&quot;</b></p>'
    data = embedded({"name": "</script>\u2028&"}, "data")
    assert data.count("<") == 2
    assert json.loads(re.sub("<[^>]*>", "", data))["name"] == "</script>\u2028&"
