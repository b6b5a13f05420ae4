from pathlib import Path

import albumentations
import numpy as np
import pytest

from faults import refused
from retina.cli.compose import compose
from retina.cli.data import DataConfig
from retina.cli.loaders import build_train_loader
from retina.cli.recipe import make_recipe
from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.data.loader import Canvas
from retina.data.repeats import Repeats, repeats_of
from retina.data.shapes import write_shapes
from retina.data.transforms import Pipeline
from retina.engine.config import TrainConfig
from retina.errors import ConfigError


def loader_of(
    root: Path, *, accumulate: int = 1, transforms: dict[str, object] | None = None, draws=None, **data: object
):
    write_shapes(root, num_train=24, num_val=1, image_size=(64, 96))
    annotations = read_coco(*locate_split(root, "train"))
    return annotations, *build_train_loader(
        annotations,
        Pipeline(transforms or {}),
        DataConfig(name="shapes", short_side=64, long_side=96, num_workers=0, **data),
        TrainConfig(batch_size=4, accumulate=accumulate, seed=3),
        Canvas(32, (0, 0, 0)),
        draws=draws and draws(annotations),
    )


@pytest.mark.parametrize("sampling", [None, "repeat_factor", "class_balanced"])
def test_the_setting_decides_which_images_are_loaded(tmp_path: Path, sampling: str | None) -> None:
    annotations, loader, sampler = loader_of(tmp_path / "shapes", sampling=sampling, repeat_threshold=0.8)
    repeats = repeats_of(annotations, sampling, threshold=0.8)
    assert sampler.images_per_epoch == (24 if repeats is None else repeats.num_draws)
    assert (sampler.images_per_epoch > 24) == (sampling == "repeat_factor")
    loaded = [index for batch in loader for index in batch.indices.tolist()]
    assert loaded == sampler.global_batches(0).ravel().tolist()
    assert (len(set(loaded)) == 24) == (sampling != "class_balanced")


def test_repeats_of_an_image_are_augmented_each_in_its_own_way(tmp_path: Path) -> None:
    noise = {"noise": albumentations.GaussNoise(std_range=(0.2, 0.4), p=1.0)}
    _, loader, _ = loader_of(tmp_path / "shapes", transforms=noise, sampling="class_balanced")
    seen = [
        (index, image.numpy().tobytes())
        for batch in loader
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    ]
    assert len({index for index, _ in seen}) < len(seen) == len(set(seen))


def test_a_batch_that_cannot_be_cut_is_one_line(tmp_path: Path) -> None:
    with refused("batch-size", "train.batch_size: ", "3", kind=ConfigError):
        loader_of(tmp_path / "shapes", accumulate=3)


class Backwards:
    """A sampler of one's own: the last images first, another half in every epoch."""

    def __init__(self, annotations: Annotations, every: int = 2) -> None:
        self.rows = np.arange(len(annotations))[::-1]
        self.every = every
        self.num_draws = len(annotations) // every

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        return self.rows[(seed + epoch) % self.every :: self.every]


def test_a_sampler_of_one_s_own_is_a_section_and_resumes_exactly(tmp_path: Path) -> None:
    section = {"_target_": f"{__name__}.Backwards", "every": 3}
    settings = compose("train", [])
    settings |= {"data": settings["data"] | {"sampling": section}, "plugins": [__name__]}
    make = make_recipe(settings).sampler
    _, loader, sampler = loader_of(tmp_path / "shapes", draws=make, sampling=section, group_by_aspect=False)
    assert sampler.global_batches(1).tolist() == [[22, 19, 16, 13], [10, 7, 4, 1]]
    sampler.start(1, 1)
    assert [batch.indices.tolist() for batch in loader] == [[10, 7, 4, 1]]


def test_a_sampler_that_draws_other_images_is_refused(tmp_path: Path) -> None:
    def other(annotations: Annotations) -> Repeats:
        return Repeats(np.array([30]), np.ones(1), np.zeros(1, np.int64))

    with refused("sampling", "data.sampling: ", "0..23"):
        loader_of(tmp_path / "shapes", draws=other, sampling={"_target_": "other"})
