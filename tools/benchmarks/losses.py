"""The losses as functions of logits and targets, forward and backward, against the form in which they are mostly copied
about: torchvision's function, or a few lines of torch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from retina.lab.clock import Bench, Row, speedup
from retina.losses.balance import hardest_negatives
from retina.losses.dice import sigmoid_dice_loss, softmax_dice_loss
from retina.losses.focal import sigmoid_focal_loss, softmax_focal_loss
from retina.losses.soft_targets import distribution_focal_loss, ghm_loss, quality_focal_loss, varifocal_loss

CLASSES = 80
Loss = Callable[[Tensor, Tensor], Tensor]


def run(bench: Bench) -> list[Row]:
    rows = 600 if bench.quick else 60_000
    side = 16 if bench.quick else 128
    logits = torch.randn(rows, CLASSES, device=bench.device) - 4.6
    index = torch.randint(0, CLASSES, (rows,), device=bench.device)
    multi_hot = (torch.rand_like(logits) < 0.002).float()
    soft = multi_hot * torch.rand_like(logits)
    distances = torch.rand(rows, 4, device=bench.device) * 16
    masks = torch.randn(16, CLASSES // 4, side, side, device=bench.device)
    pixels = torch.randint(0, CLASSES // 4, (16, side, side), device=bench.device)
    binary = (torch.rand(16, side, side, device=bench.device) < 0.1).float()
    of_rows: dict[str, tuple[Loss, Loss, Tensor, float | None]] = {
        "sigmoid focal, multi-hot": (partial(sigmoid_focal_loss, reduction="sum"), torchvisions, multi_hot, 4.0),
        "sigmoid focal, multi-hot, not summed": (sigmoid_focal_loss, torchvisions_elements, multi_hot, 4.0),
        "sigmoid focal, class indices": (partial(sigmoid_focal_loss, reduction="sum"), one_hot, index, 4.0),
        "softmax focal, class indices": (partial(softmax_focal_loss, reduction="sum"), plain_softmax, index, 4.0),
        "quality focal": (partial(quality_focal_loss, reduction="sum"), plain_quality, soft, None),
        "varifocal": (partial(varifocal_loss, reduction="sum"), plain_varifocal, soft, None),
        "GHM": (lambda x, y: ghm_loss(x, y).sum(), plain_ghm, multi_hot, None),
    }
    measured = [
        measure(bench, f"{name}, {rows:,} x {CLASSES} fp32", ours, plain, logits, targets, goal)
        for name, (ours, plain, targets, goal) in of_rows.items()
    ]
    bins = torch.randn(rows, 4, 17, device=bench.device)
    of_bins = partial(distribution_focal_loss, reduction="sum")
    name = f"distribution focal, {rows:,} x 4 x 17"
    measured.append(measure(bench, name, of_bins, plain_distribution, bins, distances))
    of_masks: dict[str, tuple[Loss, Loss, Tensor, Tensor]] = {
        "softmax focal of pixels": (partial(softmax_focal_loss, reduction="sum"), plain_softmax, masks, pixels),
        "softmax Dice": (softmax_dice_loss, plain_softmax_dice, masks, pixels),
        "sigmoid Dice": (sigmoid_dice_loss, plain_dice, masks[:, 0], binary),
        "cross entropy, 1 : 3 hardest": (ohem, plain_ohem, masks[:, 0], binary),
    }
    for name, (ours, plain, logits_of_masks, targets) in of_masks.items():
        label = f"{name}, {' x '.join(map(str, logits_of_masks.shape))}"
        measured.append(measure(bench, label, ours, plain, logits_of_masks.contiguous(), targets))
    return measured


def measure(
    bench: Bench, name: str, ours: Loss, plain: Loss, logits: Tensor, targets: Tensor, goal: float | None = None
) -> Row:
    """Both ways, whose losses and gradients are held against each other."""
    logits = logits.detach().requires_grad_()

    def backpropagate(loss: Loss) -> Tensor:
        logits.grad = None
        value = loss(logits, targets)
        value = value if value.dim() == 0 else value.sum()
        value.backward()
        return value.detach()

    values = []
    for loss in (ours, plain):
        value = backpropagate(loss)
        assert logits.grad is not None
        values.append((value, logits.grad))
    (value, grad), (expected, slope) = values
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))
    ways = {"ours": partial(backpropagate, ours), "reference": partial(backpropagate, plain)}
    return speedup(name, bench.time(ways), must=1.0, goal=goal)


def torchvisions(logits: Tensor, targets: Tensor) -> Tensor:
    return torchvision.ops.sigmoid_focal_loss(logits, targets, reduction="sum")


def torchvisions_elements(logits: Tensor, targets: Tensor) -> Tensor:
    return torchvision.ops.sigmoid_focal_loss(logits, targets)


def one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return torchvisions(logits, F.one_hot(targets, logits.shape[1]).to(logits.dtype))


def plain_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return ((1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy).sum()


def plain_quality(logits: Tensor, targets: Tensor) -> Tensor:
    distance = (targets - logits.sigmoid()).abs()
    return (distance**2 * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def plain_varifocal(logits: Tensor, targets: Tensor) -> Tensor:
    weight = torch.where(targets > 0, targets, 0.75 * logits.sigmoid() ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def plain_ghm(logits: Tensor, targets: Tensor, num_bins: int = 30) -> Tensor:
    length = (logits.detach().sigmoid() - targets).abs()
    density = torch.zeros_like(length)
    for number in range(num_bins):
        inside = (length >= number / num_bins) & (length < (number + 1) / num_bins + (number == num_bins - 1))
        density[inside] = float(inside.sum() * num_bins)
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") / density).sum()


def plain_distribution(logits: Tensor, distances: Tensor) -> Tensor:
    left = distances.long().clamp(max=logits.shape[-1] - 2)
    to_right = distances - left
    rows = logits.flatten(0, 1)
    of_left = F.cross_entropy(rows, left.flatten(), reduction="none").view_as(distances)
    of_right = F.cross_entropy(rows, left.flatten() + 1, reduction="none").view_as(distances)
    return (of_left * (1 - to_right) + of_right * to_right).sum()


def plain_softmax_dice(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.softmax(1)
    truth = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = (2, 3)
    return (1 - (2 * (p * truth).sum(axes) + 1) / (p.sum(axes) + truth.sum(axes) + 1)).mean()


def plain_dice(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    axes = (1, 2)
    return (1 - (2 * (p * targets).sum(axes) + 1) / (p.sum(axes) + targets.sum(axes) + 1)).mean()


def ohem(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    kept = hardest_negatives(losses, targets > 0)
    return torch.where(kept, losses, 0).sum()


def plain_ohem(logits: Tensor, targets: Tensor) -> Tensor:
    """With one `topk` whose size is read from the targets."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    positive = targets > 0
    negatives = losses[~positive].topk(min(3 * int(positive.sum()), int((~positive).sum()))).values
    return losses[positive].sum() + negatives.sum()
