"""Markup from text. Whatever comes from files of others is text, never markup."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retina.errors import plain


class Markup(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()


def text(value: object) -> Markup:
    """The value as text, on one harmless line."""
    return value if isinstance(value, Markup) else Markup(html.escape(plain(str(value))))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """`<name attribute="value">content</name>`. Underscores in attribute names become hyphens, a last one is dropped;
    True stands alone, None and False are left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown = key.rstrip("_").replace("_", "-")
            parts.append(shown if value is True else f'{shown}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    if name in ("img", "input", "meta", "br", "col"):
        return Markup(opening)
    return Markup(f"{opening}{''.join(text(one) for one in content)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    return Markup("".join(text(part) for part in parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, **attributes: object) -> Markup:
    """The first cell of a row is its header. A cell (text, number) is sorted by its number."""
    cells = []
    for first, *others in rows:
        numbers = [tag("td", *_cell(one), **_order(one)) for one in others]
        cells.append(tag("tr", tag("th", *_cell(first), scope="row"), *numbers))
    heads = tag("tr", *(tag("th", one, scope="col") for one in head))
    inner = tag("table", tag("caption", caption), tag("thead", heads), tag("tbody", *cells), **attributes)
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label=caption)


def _cell(value: object) -> tuple[object, ...]:
    return (value[0],) if isinstance(value, tuple) else (value,)


def _order(value: object) -> dict[str, object]:
    return {"data_order": value[1]} if isinstance(value, tuple) else {}


def embedded(values: Mapping[str, Any], name: str) -> Markup:
    """JSON for the page's script. No text in it can end the element or open another."""
    content = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(f'<script type="application/json" id="{name}">{content}</script>')


def page(title: str, body: Markup, *, style: str, script: str) -> bytes:
    """A whole file whose policy allows this style, this script and pictures within the file, and nothing else."""
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=f"{policy}; base-uri 'none'; form-action 'none'"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("title", title),
            Markup(f"<style>{style}</style>"),
        ]
    )
    code = Markup(f"<script>{script}</script>")
    whole = tag("html", tag("head", head), tag("body", body, code), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n".encode()


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
