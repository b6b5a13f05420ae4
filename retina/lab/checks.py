"""The checks that tools/train.py makes before it trains, for all lines of a study before the first run starts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from retina.cli.build import call
from retina.cli.compose import Settings
from retina.cli.recipe import make_recipe
from retina.engine.config import DataConfig, TrainConfig, from_mapping
from retina.engine.splits import load_split
from retina.errors import ConfigError, RetinaError
from retina.lab.jobs import finished
from retina.lab.study import Line


def check_lines(lines: Sequence[Line]) -> None:
    """Raises ConfigError that names the first line with runs to be made that cannot be."""
    waiting = [line for line in lines if not all(map(finished, line.jobs))]
    for line in waiting:  # before torch, which takes seconds to load
        with _naming(line):
            from_mapping(TrainConfig, line.jobs[0].settings["train"], "train")
            from_mapping(DataConfig, line.jobs[0].settings["data"], "data")
    places = []
    for line in waiting:
        settings = line.jobs[0].settings
        its = {key: value for key, value in settings["data"].items() if key not in ("short_side", "long_side")}
        with _naming(line):
            check_settings(settings)
            if its not in places:
                check_data(from_mapping(DataConfig, settings["data"], "data"))
        places.append(its)


@contextmanager
def _naming(line: Line) -> Iterator[None]:
    try:
        yield
    except RetinaError as fault:
        raise ConfigError(f"{line.label}: {fault}") from None


def check_settings(settings: Settings) -> None:
    """Raises ConfigError for what tools/train.py would refuse whatever the data. No weights are read."""
    import torch

    from retina import distributed
    from retina.engine.optim import build_optimizer
    from retina.model.retinanet import retinanet

    call(distributed.choose_device, "train.device", name=settings["train"]["device"])
    recipe = make_recipe(settings)
    with torch.device("meta"):  # shapes alone
        call(retinanet, "model", **settings["model"] | {"weights": None}, num_classes=1)
    recipe.schedule(0, total=1000, steps_per_epoch=100)
    build_optimizer(recipe.optimizer, torch.nn.Conv2d(1, 1, 1))


def check_data(data: DataConfig) -> None:
    """Raises RetinaError for annotations that are not there or faulty, unless the run makes its data set itself."""
    if not (data.prepare and data.root):
        classes = load_split(data, "train").classes
        load_split(data, "val", classes=classes)
