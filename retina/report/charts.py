"""Line charts as SVG, readable without a script, in light and dark and without colours."""

from collections.abc import Sequence
from typing import NamedTuple

from retina.report.html import Markup, join, tag

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 360, 240, 44, 12, 40, 12


class Line(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None leaves a gap."""
    number: int = 0
    """Of its colour and dashes."""


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] = (0.0, 1.0),
    y_range: tuple[float, float] = (0.0, 1.0),
    name: str = "",
) -> Markup:
    """A figure with its legend. `name`: the id by which the script finds it."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return f"{LEFT + width * across:.1f},{TOP + height * (1 - min(max(up, 0), 1)):.1f}"

    drawn = []
    for step in range(5):
        share = step / 4
        x, y = LEFT + width * share, TOP + height * (1 - share)
        value_x, value_y = (low + share * (high - low) for low, high in (x_range, y_range))
        drawn.append(tag("line", x1=LEFT, x2=LEFT + width, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        drawn.append(tag("text", f"{value_y:g}", x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
        drawn.append(tag("text", f"{value_x:g}", x=f"{x:.1f}", y=TOP + height + 16, text_anchor="middle"))
    drawn.append(tag("text", x_label, x=LEFT + width / 2, y=HEIGHT - 6, text_anchor="middle"))
    middle = TOP + height / 2
    drawn.append(tag("text", y_label, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})"))
    for line in lines:
        for stretch in _stretches(line):
            points = " ".join(place(x, y) for x, y in stretch)
            drawn.append(tag("polyline", points=points, class_=f"line c{line.number}", data_line=line.name))
    frame = f"0 0 {WIDTH} {HEIGHT}"
    picture = tag("svg", *drawn, viewBox=frame, role="img", aria_label=f"{title}: {y_label} over {x_label}")
    legend = join(
        tag(
            "span",
            tag("svg", tag("polyline", points="0,6 24,6", class_=f"line c{line.number}"), viewBox="0 0 24 12"),
            line.name,
        )
        for line in lines
    )
    shown = tag("p", legend, class_="legend") if len(lines) > 1 else ""
    return tag("figure", tag("figcaption", title), picture, shown, id=name or None)


def _stretches(line: Line) -> list[list[tuple[float, float]]]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((float(x), float(y)))
    return [stretch for stretch in stretches if stretch]


def heat(values: Sequence[Sequence[int]], names: Sequence[str], name: str) -> Markup:
    """A confusion matrix as a table; shades go from the largest share of a row."""
    ends = [*names, "nothing there"]
    columns = [*names, "not found"]
    head = tag("tr", tag("th", "is \\ found as", scope="col"), *(tag("th", one, scope="col") for one in columns))
    rows = []
    for row, title in enumerate(ends):
        total = sum(values[row]) or 1
        cells = []
        for column, count in enumerate(values[row]):
            level = round(8 * count / total) if row < len(names) else 0
            kind = "right" if row == column and row < len(names) else "wrong"
            cells.append(tag("td", "" if (row, column) == (len(names),) * 2 else count, class_=f"{kind} s{level}"))
        rows.append(tag("tr", tag("th", title, scope="row"), *cells))
    inner = tag("table", tag("caption", "Confusion"), tag("thead", head), tag("tbody", *rows), class_="heat", id=name)
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label="Confusion matrix")
