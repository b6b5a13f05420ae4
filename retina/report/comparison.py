"""`comparison.html`: which detector is better, by how much, and on which images."""

from collections.abc import Mapping, Sequence
from typing import Any

from retina.data.images import MAX_PIXELS
from retina.evaluation.analysis import Analysis
from retina.evaluation.compare import changed_images, verdict
from retina.report.gallery import KEY, figures
from retina.report.html import Markup, number, page, table, tag
from retina.report.look import SCRIPT, STYLE

MAX_BYTES = 1_500_000


def build_comparison(
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    analyses: Sequence[Analysis],
    *,
    command: str,
    settings: Sequence[Sequence[str]] = (),
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """results: of each source after the first, compared with the first. settings: lines of what differs, likewise."""
    first, classes = names[0], analyses[0].values["classes"]
    sections: list[Markup] = [tag("h1", "Comparison")]
    for place, (name, result) in enumerate(zip(names[1:], results, strict=True), start=1):
        sections.append(tag("h2", f"{name} against {first}"))
        sections.append(tag("p", verdict(dict(result), first, name), class_="lead"))
        head = ("", first, name, "difference", "95 % interval", "p")
        rows = [_row(key, one) for key, one in {**result["overall"], **result["sizes"]}.items()]
        sections.append(table(head, rows, f"{result['images']} images, {result['draws']} paired resamples"))
        rows = [_row(one, values) for one, values in zip(classes, result["classes"], strict=True)]
        sections.append(table(head, rows, "AP of each class", class_="sorts"))
        better, worse = changed_images(analyses[0], analyses[place])
        for title, images in (("better", better), ("worse", worse)):
            shots = list(figures(analyses[place], images=images, max_bytes=MAX_BYTES, max_pixels=max_pixels))
            listed = [analyses[0].outcomes.annotations.file_name(image) for image in images]
            what = f"Images that got {title}, as {name} sees them"
            sections.append(tag("h3", what))
            sections.append(tag("div", *shots, class_="gallery") if shots else tag("p", ", ".join(listed) or "none"))
        for line in settings[place - 1] if settings else ():
            sections.append(tag("p", line, class_="soft"))
    sections.append(tag("p", KEY, class_="key"))
    sections.append(tag("p", "Made by ", tag("code", command), class_="soft"))
    return page("Comparison", tag("main", *sections), style=STYLE, script=SCRIPT)


def _row(name: str, values: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if values is None:
        return (name, "-", "-", "-", "-", "-")
    span = f"{values['low']:+.3f} to {values['high']:+.3f}" if "low" in values else ""
    chance = number(values.get("p"), 3) if "p" in values else ""
    change = (f"{values['difference']:+.3f}", values["difference"])
    return (name, number(values["first"], 3), number(values["second"], 3), change, span, chance)
