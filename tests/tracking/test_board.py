import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retina.tracking.tensorboard import Board
from retina.tracking.trackers import TensorBoard


def shown(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_tensorboard_reads_numbers_and_pictures(tmp_path: Path) -> None:
    board = Board(tmp_path / "deep" / "board", 0)
    board.scalars(3, {"train/loss": 0.5})
    board.pictures(3, {"val/pictures": np.full((4, 6, 3), 200, np.uint8)})
    board.end()
    (scalar,) = shown(tmp_path / "deep" / "board").Scalars("train/loss")
    assert (scalar.step, scalar.value) == (3, 0.5)
    (picture,) = shown(tmp_path / "deep" / "board").Images("val/pictures")
    assert (picture.step, picture.height, picture.width) == (3, 4, 6)
    np.testing.assert_allclose(np.asarray(Image.open(BytesIO(picture.encoded_image_string))), 200, atol=2)


def test_what_came_after_the_step_a_run_goes_on_from_is_hidden(tmp_path: Path) -> None:
    first = Board(tmp_path, 0)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": float(step)})
    first.end()
    second = Board(tmp_path, 2)
    second.scalars(3, {"loss": 9.0})
    second.end()
    assert [(e.step, e.value) for e in shown(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_folder_that_cannot_be_made_is_an_os_error_and_the_record_follows(tmp_path: Path) -> None:
    (tmp_path / "board").write_text("in the way")
    board = Board(tmp_path / "board", 0)
    with pytest.raises(FileExistsError):
        board.scalars(1, {"loss": 1.0})
    (tmp_path / "board").unlink()
    board.scalars(2, {"loss": 2.0})
    board.end()
    assert [event.step for event in shown(tmp_path / "board").Scalars("loss")] == [1, 2]


def test_a_clock_set_back_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / f"events.out.tfevents.{time.time() + 3600:.6f}.host.1").touch()  # a session before the clock was set
    for step in (1, 2):
        board = Board(tmp_path, step - 1)
        board.scalars(step, {"loss": 1.0})
        board.end()
    files = sorted(tmp_path.iterdir(), key=lambda file: file.name)
    assert [file.stat().st_size > 0 for file in files] == [False, True, True]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[0].wall_time > time.time() + 1800


def test_settings_and_charts_of_several_curves(tmp_path: Path) -> None:
    tracker = TensorBoard()
    tracker.start(tmp_path, {"optimizer": {"lr": 0.1}, "name": "run", "data": {"classes": ["a"]}}, 0)
    tracker.scalars(4, {"val/AP": 0.25, "val/loss": 1.5, "val/AR100": 0.5})
    tracker.end()
    board = shown(tmp_path / "tensorboard")
    content = b"".join(board.PluginTagToContent("hparams").values())
    assert all(part in content for part in (b"optimizer.lr", b"name", b"val/AP", b"val/loss"))
    assert b"val/AR100" not in content
    assert b"classes" not in content, "TensorBoard shows no lists"
    (layout,) = board.PluginTagToContent("custom_scalars").keys()
    (tensor,) = board.Tensors(layout)
    assert b"train/loss" in tensor.tensor_proto.string_val[0]
    assert b"val/loss" in tensor.tensor_proto.string_val[0]


def test_a_run_without_results_has_no_settings(tmp_path: Path) -> None:
    tracker = TensorBoard()
    tracker.start(tmp_path, {"name": "run"}, 0)
    tracker.scalars(1, {"train/loss": 1.0})
    tracker.end()
    assert "hparams" not in shown(tmp_path / "tensorboard").summary_metadata
    with pytest.raises(KeyError):
        shown(tmp_path / "tensorboard").PluginTagToContent("hparams")
