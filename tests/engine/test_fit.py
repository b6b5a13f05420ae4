"""`fit` as a library: plain PyTorch parts around it, no run folder, no command line."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from faults import refused
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.loop import fit
from retina.engine.step import train_step
from retina.errors import ConfigError, RetinaError
from retina.evaluation.evaluate import Evaluation
from retina.evaluation.metrics import DetectionArrays
from retina.losses.detection import DetectionLoss
from retina.types import Batch, Predictions, Targets

SIDE, STRIDE, CLASSES = 64, 16, 2


NOTHING = DetectionArrays(*(torch.zeros(0).numpy() for _ in range(4)))


class TinyDetector(nn.Module):
    """Knows nothing of this library except the type that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, STRIDE, stride=STRIDE)
        self.head = nn.Conv2d(8, CLASSES + 4, 1)

    def forward(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> Predictions:
        out = self.head(self.body(images.float() / 255).relu()).flatten(2).mT
        return Predictions((out[..., :CLASSES],), (out[..., CLASSES:],), (ANCHORS,))


CENTRES = torch.arange(STRIDE / 2, SIDE, STRIDE)
ANCHORS = torch.stack([torch.tensor([x - 8, y - 8, x + 8, y + 8]) for y in CENTRES.tolist() for x in CENTRES.tolist()])


class Squares(Dataset[Batch]):
    """Ready-made batches of one image with one bright square."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Batch:
        images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
        corner = 16 * (index % 4)
        images[:, :, corner : corner + 16, corner : corner + 16] = 255
        box = torch.tensor([[[corner, corner, corner + 16.0, corner + 16.0]]])
        one = torch.ones(1, 1, dtype=torch.bool)
        targets = Targets(box, torch.full((1, 1), index % CLASSES), one, ~one)
        size = torch.tensor([[SIDE, SIDE]])
        return Batch(images, size, targets, torch.tensor([index]), size)


def loader() -> DataLoader[Batch]:
    return DataLoader(Squares(), batch_size=None)


def make_state(config: TrainConfig, **options: object) -> TrainState:
    torch.manual_seed(0)
    model = TinyDetector()
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01), config, **options)  # type: ignore[arg-type]


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_plain_parts_train_as_the_bare_update_does() -> None:
    """A plain optimizer, loader and function of the step, and any module that returns `Predictions`."""
    state = make_state(TrainConfig(length="2ep", log_every=3, clip_norm=None), schedule=lambda step: 0.5**step)
    assert fit(state, DetectionLoss(), loader()) == 0
    assert state.progress.step == 8

    other = make_state(TrainConfig())
    for step, batch in enumerate([*loader(), *loader()]):
        other.optimizer.param_groups[0]["lr"] = 0.01 * 0.5**step
        train_step(other.model, DetectionLoss(), [batch], optimizer=other.optimizer)
    assert torch.equal(weights(state), weights(other))


def test_a_warm_start_is_for_the_first_share_of_the_run() -> None:
    first, then = DetectionLoss(box_weight=3.0, box_weighting="centerness"), DetectionLoss()
    state = make_state(TrainConfig(length="2ep", log_every=3, clip_norm=None))
    fit(state, replace(then, warm_start=first, warm_start_share=0.5), loader())
    other = make_state(TrainConfig())
    for step, batch in enumerate([*loader(), *loader()]):
        train_step(other.model, first if step < 4 else then, [batch], optimizer=other.optimizer)
    assert torch.equal(weights(state), weights(other))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_loader_resumes_where_it_stopped(tmp_path: Path, accumulate: int) -> None:
    config = TrainConfig(length=6, save_every=1, accumulate=accumulate, ema=0.9)
    whole = make_state(config)
    fit(whole, DetectionLoss(), loader())

    calls: Iterator[int] = iter([0, 0, 0, 15, 15, 15])
    state = make_state(config)
    saved = partial(Checkpointer, tmp_path)
    assert fit(state, DetectionLoss(), loader(), checkpointer=saved(state), stopping=lambda: next(calls)) == 15
    assert state.progress.step == 3
    state = make_state(config)
    assert fit(state, DetectionLoss(), loader(), checkpointer=saved(state)) == 0
    assert torch.equal(weights(state), weights(whole))
    assert (tmp_path / "best.safetensors").is_file(), "without an evaluation the last weights are the ones to use"


def test_the_best_evaluation_is_remembered_and_patience_ends_the_run(tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.2, 0.3])

    def evaluate(model: nn.Module) -> Evaluation:
        return Evaluation({"AP": next(scores), "AP50": 0.0, "AP75": 0.0, "AR100": 0.0}, NOTHING, {})

    state = make_state(TrainConfig(length=100, eval_every=2, patience=2))
    assert fit(state, DetectionLoss(), loader(), evaluate=evaluate, checkpointer=Checkpointer(tmp_path, state)) == 0
    assert (state.progress.step, state.progress.best, state.progress.best_step) == (8, 0.5, 4)
    assert state.progress.stopped_early
    assert (tmp_path / "best.safetensors").is_file()


def test_what_could_not_be_saved_is_tried_again_before_the_next_save(tmp_path: Path) -> None:
    """Plain files in the way make the checkpoint of step 2 and the best weights of step 4 fail."""
    state = make_state(TrainConfig(length=9, eval_every=4, save_every=2, log_every=1))
    checkpoints, best = tmp_path / "checkpoints", tmp_path / "best.safetensors"
    checkpoints.touch()
    seen: list[tuple[int, bool, bool]] = []

    def stopping() -> int:
        step = state.progress.step
        seen.append((step, (checkpoints / f"step_{step:08d}").is_dir(), best.is_file()))
        if step == 2:
            checkpoints.unlink()
            (best / "in the way").mkdir(parents=True)
        if step == 4:
            (best / "in the way").rmdir()
            best.rmdir()
        return 0

    def evaluate(model: nn.Module) -> Evaluation:
        return Evaluation({"AP": 1 / state.progress.step, "AP50": 0.0, "AP75": 0.0, "AR100": 0.0}, NOTHING, {})

    checkpointer = Checkpointer(tmp_path, state)
    stopped = fit(state, DetectionLoss(), loader(), evaluate=evaluate, checkpointer=checkpointer, stopping=stopping)
    assert stopped == 0
    assert seen[2:6] == [(2, False, False), (3, True, False), (4, True, False), (5, False, True)]
    assert (state.progress.best, state.progress.best_step) == (0.25, 4)


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path: Path) -> None:
    state = make_state(TrainConfig(length=3, save_every=1))
    fit(state, DetectionLoss(), loader(), checkpointer=Checkpointer(tmp_path, state))
    state = make_state(TrainConfig(length=2, save_every=1))
    with refused("beyond-the-end", "length", "step 3", kind=ConfigError):
        fit(state, DetectionLoss(), loader(), checkpointer=Checkpointer(tmp_path, state), stopping=lambda: 15)


def test_skipped_updates_are_not_silent_without_a_recorder(caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(TrainConfig(length=2, max_bad_steps=2))
    with torch.no_grad():
        next(state.model.parameters()).fill_(math.nan)
    with refused("diverged", "step 2", "2 in a row", kind=RetinaError):
        fit(state, DetectionLoss(), loader())
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("retina", "WARNING")
    assert record.getMessage().startswith("step 1: update skipped")
