"""Draws losses of the family and their gradients, as in Figure 1 of the focal loss paper.

python tools/lab.py curves
python tools/lab.py curves losses=quality_focal output=out/quality_focal.svg
python tools/lab.py curves 'losses=[focal,balanced_cross_entropy]' output=out/two.png

Every curve is computed by the library's own function, and every gradient by differentiating it. The gradient is that
with respect to the logit, which is what reaches the network.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import retina
from retina.cli.compose import Settings, entry
from retina.engine.config import from_mapping
from retina.errors import ConfigError
from retina.lab.figures import check_format, save
from retina.printing import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


class Curve(NamedTuple):
    """A loss of one element that is predicted with probability p, for each value of one parameter."""

    loss: Callable[["Tensor", float], "Tensor"]
    """(logits, value) -> losses."""
    parameter: str
    values: Sequence[float]
    formula: str
    least: float = 0
    most: float = inf
    """Of the values, which are finite."""
    soft: bool = False
    """Whether p is the score, against targets anywhere in [0, 1]; otherwise p is the probability of the truth."""


def _filled(logits: "Tensor", value: float) -> "Tensor":
    return logits.new_full(logits.shape, value)


def _softmax_focal(logits: "Tensor", gamma: float) -> "Tensor":
    """Of the first of two classes, whose logits differ by `logits`."""
    both = logits[:, None] * logits.new_tensor([1.0, 0.0])
    return retina.softmax_focal_loss(both, _filled(logits, 0).long(), gamma=gamma)


def _dice(logits: "Tensor", beta: float) -> "Tensor":
    """Of masks that are found with one probability throughout, and nothing outside them."""
    return retina.sigmoid_dice_loss(
        logits[:, None], _filled(logits, 1)[:, None], beta=beta, smooth=1e-9, reduction="none"
    )


def _distribution_focal(logits: "Tensor", target: float) -> "Tensor":
    """Of two bins, whose logits differ by `logits`."""
    return retina.distribution_focal_loss(logits[:, None] * logits.new_tensor([0.0, 1.0]), _filled(logits, target))


def _focal(logits: "Tensor", alpha: float | None, gamma: float) -> "Tensor":
    return retina.sigmoid_focal_loss(logits, _filled(logits, 1), alpha=alpha, gamma=gamma)


GAMMAS, SHARES = (0, 0.5, 1, 2, 5), (0, 0.25, 0.5, 0.75, 1)
CURVES = {
    "focal": Curve(lambda x, gamma: _focal(x, None, gamma), "gamma", GAMMAS, "(1 - p)^gamma CE(p)"),
    "cross_entropy": Curve(lambda x, gamma: _focal(x, None, gamma), "gamma", (0,), "CE(p) = -log p", most=0),
    "balanced_cross_entropy": Curve(
        lambda x, alpha: _focal(x, alpha, 0.0), "alpha", SHARES[1:], "alpha CE(p), of positives", most=1
    ),
    "balanced_focal": Curve(
        lambda x, alpha: _focal(x, alpha, 2.0), "alpha", SHARES[1:], "alpha (1 - p)^2 CE(p), of positives", most=1
    ),
    "softmax_focal": Curve(_softmax_focal, "gamma", GAMMAS, "(1 - p)^gamma CE(p), of one class of two"),
    "quality_focal": Curve(
        lambda x, target: retina.quality_focal_loss(x, _filled(x, target)),
        *("target", SHARES, "|target - p|^2 BCE(p, target)"),
        most=1,
        soft=True,
    ),
    "varifocal": Curve(
        lambda x, target: retina.varifocal_loss(x, _filled(x, target)),
        *("target", SHARES, "target BCE(p, target); of negatives 0.75 p^2 BCE(p, 0)"),
        most=1,
        soft=True,
    ),
    "distribution_focal": Curve(
        *(_distribution_focal, "target", SHARES, "BCE(p, target), p of the farther of two bins"), most=1, soft=True
    ),
    "dice": Curve(_dice, "beta", (1,), "1 - D, D = 2 p / (1 + p), of a mask found with p", least=1, most=1),
    "focal_dice": Curve(_dice, "beta", (1, 2, 3, 5), "1 - D^(1 / beta), D = 2 p / (1 + p)", least=1),
}
WITHOUT = {
    "ghm": "it divides by how many elements of the batch have such a gradient",
    "ohem": "it chooses among the anchors of an image, and what it chooses has cross_entropy",
}
"""Losses that are no function of one logit, and why."""


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """configs/lab_curves.yaml says what each is."""

    losses: str | list[str]
    values: list[float] | None
    output: str
    traceback: bool

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in CURVES:
                reason = f"has no curve: {WITHOUT[name]}" if name in WITHOUT else "no such loss"
                near = difflib.get_close_matches(str(name), CURVES, n=1)
                hint = f"did you mean {near[0]}? There are " if near and name not in WITHOUT else "choose among "
                problem = f"{name}: {reason} - {hint}{', '.join(CURVES)}"
                raise ConfigError(problem, code="unknown-value", key="losses")
        if self.values is not None and len({CURVES[name].parameter for name in self.names}) > 1:
            problem = "of which parameter? - give values for one loss, or null"
            raise ConfigError(problem, code="contradiction", key="values")
        if not self.names or self.values == []:
            problem = "nothing to draw - give at least one loss and one value"
            raise ConfigError(problem, code="missing-setting", key="losses")
        for curve, value in itertools.product((CURVES[name] for name in self.names), self.values or []):
            if not curve.least <= value <= curve.most or abs(value) == inf:
                to = f" to {curve.most:g}" if curve.most < inf else ", finite"
                allowed = f"{curve.parameter} from {curve.least:g}{to}" if curve.least < curve.most else "null"
                raise ConfigError(f"{value:g} is not allowed - give {allowed}", code="out-of-range", key="values")
        check_format(Path(self.output), "output")

    @property
    def names(self) -> list[str]:
        return [self.losses] if isinstance(self.losses, str) else self.losses


@entry("lab_curves")
def main(settings: Settings) -> None:
    config = from_mapping(CurvesConfig, settings)
    output = Path(config.output)

    from matplotlib.figure import Figure  # slow to import, and a wrong setting should not wait for it

    figure = Figure(figsize=(11, 4.2 * len(config.names)), layout="constrained")
    rows = figure.subplots(len(config.names), 2, squeeze=False)
    for name, (left, right) in zip(config.names, rows, strict=True):
        draw(CURVES[name], name, config.values, left, right)
    save(figure, output)
    say(f"written: {output}")


def draw(curve: Curve, name: str, values: Sequence[float] | None, left: "Axes", right: "Axes") -> None:
    """The loss on the left, the size of its gradient on the right."""
    for value in values or curve.values:
        p, loss, gradient = sample(curve, value)
        label = f"{curve.parameter} = {value:g}"
        left.plot(p, loss, label=label)
        right.plot(p, gradient.abs(), label=label)
    left.set(ylim=(0, min(5, left.get_ylim()[1])), ylabel="loss")
    right.set(ylim=(0, None), ylabel="|d loss / d logit|")
    for axes in (left, right):
        meaning = "score" if curve.soft else "probability of the truth"
        axes.set(xlim=(0, 1), xlabel=f"{meaning} p", title=f"{name.replace('_', ' ')}: {curve.formula}")
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
        axes.legend()
        if not curve.soft:
            axes.axvspan(0.5, 1, color="0.93", zorder=0)
            axes.text(0.97, 0.5, "well classified", transform=axes.transAxes, ha="right", color="0.4")


def sample(curve: Curve, value: float) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Probabilities strictly between 0 and 1, the loss at each and its derivative with respect to the logit."""
    import torch

    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = p.logit().requires_grad_()
    loss = curve.loss(logits, float(value))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return p, loss.detach(), gradient
