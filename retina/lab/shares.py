"""What the histograms of a detector's elements say: numbers and a summary."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retina.lab.elements import Elements
    from retina.lab.histogram import Bins

SHARES = [*(i / 100 for i in range(100)), *(1 - 10 ** (-i / 10) for i in range(21, 60)), 1.0]
"""Of the elements, easiest first: where the cumulative loss is told. Dense at the end, where it rises."""


def describe(
    elements: "Elements",
    classes: Sequence[str],
    levels: Sequence[str],
    gammas: Sequence[float],
    alphas: Sequence[float],
) -> dict[str, Any]:
    """All numbers, as they go into the file."""
    groups = {"positives": elements.positives, "negatives": elements.negatives}
    names = {"class": classes, "level": levels}
    whole = {kind: of["class"].all() for kind, of in groups.items()}
    anchors = max(elements.positive_anchors, 1)
    rescored = []
    for gamma in gammas:
        positives, negatives = (whole[kind].total(gamma) / anchors for kind in ("positives", "negatives"))
        for alpha in [None, *alphas]:
            weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
            parts = [weight * part for weight, part in zip(weights, (positives, negatives), strict=True)]
            share = parts[0] / sum(parts) if sum(parts) else 0.0
            rescored.append(
                {"gamma": gamma, "alpha": alpha, "loss_per_positive": sum(parts), "share_of_positives": share}
            )
    found: dict[str, Any] = {
        "anchors": elements.anchors,
        "positive_anchors": elements.positive_anchors,
        "rescored": rescored,
        "shares": SHARES,
    }
    for kind, of in groups.items():
        found[kind] = {"all": numbers(whole[kind], whole[kind], gammas)}
        for by in ("class", "level"):
            found[kind][by] = {name: numbers(of[by].of(i), whole[kind], gammas) for i, name in enumerate(names[by])}
    return found


def numbers(bins: "Bins", whole: "Bins", gammas: Sequence[float]) -> dict[str, Any]:
    """Of one group of elements, under each gamma and without alpha; `share` is the group's part of the whole loss."""
    count = int(bins.counts.sum())
    found: dict[str, Any] = {"elements": count}
    for gamma in gammas:
        found[f"gamma {gamma:g}"] = {
            "mean_loss": bins.total(gamma) / max(count, 1),
            "share": bins.total(gamma) / (whole.total(gamma) or 1),
            "hardest_1_percent": bins.hardest(gamma, 0.01),
            "hardest_10_percent": bins.hardest(gamma, 0.1),
            "cumulative": bins.cumulative(gamma, SHARES),
        }
    return found


def summary(result: Mapping[str, Any]) -> str:
    """What the screen shows."""
    kinds = ("positives", "negatives")
    counts = ", ".join(f"{result[kind]['all']['elements']:,} {kind}" for kind in kinds)
    lines = [
        f"{result['images']:,} images, {result['positive_anchors']:,} of {result['anchors']:,} anchors positive",
        f"elements: {counts}",
        "",
        "share of the loss that the hardest 1 % and 10 % carry:",
        f"{'gamma':<8}" + "".join(f"{kind:>22}" for kind in kinds),
    ]
    for gamma in (key for key in result["positives"]["all"] if key.startswith("gamma ")):
        cells = (result[kind]["all"][gamma] for kind in kinds)
        shown = (f"{of['hardest_1_percent']:.1%} {of['hardest_10_percent']:7.1%}" for of in cells)
        lines.append(f"{gamma.removeprefix('gamma '):<8}" + "".join(f"{cell:>22}" for cell in shown))
    lines += [
        "",
        "the same logits under other losses:",
        f"{'gamma':<8}{'alpha':<8}{'per positive':>14}{'of positives':>14}",
    ]
    for row in result["rescored"]:
        alpha = "none" if row["alpha"] is None else f"{row['alpha']:g}"
        told = f"{row['loss_per_positive']:>14.4g}{row['share_of_positives']:>14.1%}"
        lines.append(f"{row['gamma']:<8g}{alpha:<8}{told}")
    return "\n".join(lines)
