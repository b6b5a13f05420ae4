"""An image classifier on a folder in which one class is rare: four ways to train it, side by side.

    python examples/imbalanced_classifier.py             # draws 1710 parts first: a minute or two on a CPU
    python examples/imbalanced_classifier.py --data DIR  # your own images: DIR/train/CLASS/*.png, DIR/val/CLASS/*.png

Folders are those of torchvision's ImageFolder. Network, initial weights, images per epoch and learning rate are the
same for all four; what differs is one line in `methods`.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from retina.data.repeats import RepeatSampler, class_balanced
from retina.losses.balance import class_balanced_weights
from retina.losses.focal import SoftmaxFocalLoss

SIDE = 32  # pixels that images are resized to
BATCH_SIZE = 16
LEARNING_RATE = 0.003
DRAWN = {"train": {"ok": 1000, "dent": 100, "crack": 10}, "val": {"ok": 300, "dent": 150, "crack": 150}}


class Method(NamedTuple):
    loss: nn.Module
    resample: bool = False


def methods(counts: Sequence[int]) -> dict[str, Method]:
    """`counts` is the number of training images of each class."""
    weights = class_balanced_weights(counts)  # by the effective number of images
    return {
        "cross entropy": Method(nn.CrossEntropyLoss()),
        "weighted": Method(nn.CrossEntropyLoss(weights)),
        "resampled": Method(nn.CrossEntropyLoss(), resample=True),
        "focal": Method(SoftmaxFocalLoss(gamma=2.0)),
    }


class Split(NamedTuple):
    """All images of a folder, small enough to be kept in memory."""

    images: Tensor  # [N 3 SIDE SIDE], 0 to 1
    labels: Tensor  # [N]
    classes: list[str]

    def counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()


def read(folder: Path) -> Split:
    transform = v2.Compose(
        [v2.ToImage(), v2.Resize([SIDE, SIDE], antialias=True), v2.ToDtype(torch.float32, scale=True)]
    )
    found = ImageFolder(folder, transform)
    return Split(torch.stack([image for image, _ in found]), torch.tensor(found.targets), found.classes)


def train(train_split: Split, method: Method, *, epochs: int, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    model = network(train_split).to(device)
    loss_of = method.loss.to(device)
    dataset = TensorDataset(train_split.images, train_split.labels)
    if method.resample:
        sampler = RepeatSampler(class_balanced(train_split.labels.tolist()), seed=seed)
        loader = DataLoader(dataset, BATCH_SIZE, sampler=sampler)
    else:
        sampler = None
        loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        if sampler:
            sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = loss_of(model(flipped(images).to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def network(train_split: Split) -> nn.Module:
    def conv(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(channels), nn.ReLU()]

    images = train_split.images
    normalize = v2.Normalize(images.mean(dim=(0, 2, 3)).tolist(), images.std(dim=(0, 2, 3)).tolist())
    layers = [*conv(3, 16, 2), *conv(16, 32, 2), *conv(32, 32, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    return nn.Sequential(normalize, *layers, nn.Linear(32, len(train_split.classes)))


def flipped(images: Tensor) -> Tensor:
    """A batch as it is, mirrored, or upside down, at random."""
    return images.flip([axis for axis in (-1, -2) if torch.rand(()) < 0.5])


@torch.no_grad()
def recalls(model: nn.Module, val: Split, device: torch.device) -> list[float]:
    """The share of each class's images that is recognised."""
    predicted = torch.cat([model(images.to(device)).argmax(dim=1).cpu() for images in val.images.split(500)])
    right = torch.bincount(val.labels[predicted == val.labels], minlength=len(val.classes))
    return (right / torch.bincount(val.labels, minlength=len(val.classes))).tolist()


def table(results: Mapping[str, Sequence[Sequence[float]]], train_split: Split, val: Split) -> str:
    """Markdown: means over seeds, and the range of the rarest class's recall."""
    rarest = int(np.argmin(train_split.counts()))
    share = np.array(val.counts()) / len(val.labels)
    heads = ["trained with", "accuracy", "balanced accuracy", *(f"recall {name}" for name in val.classes)]
    rows = [[*heads, f"recall {val.classes[rarest]} over seeds"]]
    for name, of_seeds in results.items():
        mean, low, high = (f(np.array(of_seeds), axis=0) for f in (np.mean, np.min, np.max))
        numbers = [mean @ share, mean.mean(), *mean]
        rows.append([name, *(f"{number:.3f}" for number in numbers), f"{low[rarest]:.3f} to {high[rarest]:.3f}"])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_folder(root: Path, counts: Mapping[str, Mapping[str, int]], *, seed: int = 0) -> None:
    """Writes `root`/SPLIT/CLASS/NUMBER.png: round parts with dust on them, that are ok, dented or cracked."""
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    for number, (split, of_class) in enumerate(counts.items()):
        rng = np.random.default_rng((seed, number))
        for name, count in of_class.items():
            folder = unfinished / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draw_part(name, rng)).save(folder / f"{index:04}.png")
    unfinished.rename(root)


def draw_part(kind: str, rng: np.random.Generator) -> np.ndarray:
    def polar(distance: float) -> tuple[float, float]:
        angle = rng.uniform(0, 2 * math.pi)
        return y0 + distance * math.sin(angle), x0 + distance * math.cos(angle)

    def disc(y_center: float, x_center: float, radius: float) -> np.ndarray:
        return np.clip(radius + 0.5 - np.hypot(y - y_center, x - x_center), 0, 1)

    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    y0, x0 = SIDE / 2 + rng.uniform(-3, 3, 2)
    radius = rng.uniform(9, 12)
    part = disc(y0, x0, radius)
    shade = np.zeros_like(part)
    for _ in range(rng.integers(0, 3)):  # dust, on all kinds
        shade += rng.uniform(20, 60) * disc(*polar(radius * 0.8 * math.sqrt(rng.uniform())), rng.uniform(0.8, 1.8))
    if kind == "dent":
        part *= 1 - disc(*polar(radius), rng.uniform(2.5, 4.5))
    if kind == "crack":
        y1, x1 = polar(radius * 0.4 * math.sqrt(rng.uniform()))
        tilt = rng.uniform(0, math.pi)
        along = (y - y1) * math.sin(tilt) + (x - x1) * math.cos(tilt)
        across = (y - y1) * math.cos(tilt) - (x - x1) * math.sin(tilt)
        shade += rng.uniform(45, 90) * np.clip(1.4 - np.abs(across), 0, 1) * (np.abs(along) < rng.uniform(4, 8))
    ground = rng.uniform(60, 110) + rng.uniform(-1, 1) * (x - SIDE / 2) + rng.uniform(-1, 1) * (y - SIDE / 2)
    image = ground + part * (rng.uniform(50, 90) - shade) + rng.normal(0, 5, part.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Returns the recalls of the classes, by method and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/ and val/CLASS/; else one is drawn")
    parser.add_argument("--drawn", type=Path, default=Path("data/parts"), help="where the drawn one is kept")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="trainings per method")
    parser.add_argument("--device", type=torch.device, default="cpu")
    given = parser.parse_args(argv)
    if given.epochs < 1 or given.seeds < 1:
        parser.error("--epochs and --seeds: give 1 or more")
    if given.data is None and not given.drawn.exists():
        draw_folder(given.drawn, DRAWN)
    root = given.data or given.drawn
    try:
        train_split, val = read(root / "train"), read(root / "val")
    except FileNotFoundError as fault:
        parser.error(str(fault).splitlines()[0])
    if train_split.classes != val.classes:
        of_train, of_val = (", ".join(split.classes) for split in (train_split, val))
        parser.error(f"{root}: classes of train ({of_train}) and val ({of_val}) differ - name the folders alike")

    for name, split in {"train": train_split, "val": val}.items():
        print(f"{root / name}: {', '.join(map(' '.join, zip(map(str, split.counts()), split.classes, strict=True)))}")
    results: dict[str, list[list[float]]] = {}
    for seed in range(given.seeds):
        for name, method in methods(train_split.counts()).items():
            model = train(train_split, method, epochs=given.epochs, seed=seed, device=given.device)
            found = recalls(model, val, given.device)
            results.setdefault(name, []).append(found)
            print(f"seed {seed}  {name:<14} recall {' '.join(f'{recall:.3f}' for recall in found)}", flush=True)
    print(f"\n{table(results, train_split, val)}\n")
    print(f"Means of {given.seeds} trainings of {given.epochs} epochs; accuracy is that on the mixture of val.")
    print("Differences smaller than those between seeds mean nothing. Other data or more epochs: other numbers.")
    return results


if __name__ == "__main__":
    main()
