"""Thresholds in the header of weights: written by the command, used by inference, overridden by a score."""

import shutil
from pathlib import Path

import pytest
import torch

import retina
from commands import Capture, Tool, one_line
from outputs import images_found
from retina.model.weights import load_detector, read_card


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_weights_get_thresholds_that_inference_uses(tool: Tool, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    before, card = load_detector(run / "best.safetensors", torch.device("cpu"))
    assert card.operating_point == {}
    assert tool("tune_thresholds", f"checkpoint={run}", "goal=false_alarms", "target=2", "device=cpu") == 0
    after, tuned = load_detector(run / "best.safetensors", torch.device("cpu"))
    point = tuned.operating_point
    assert (point["goal"], point["num_images"], len(point["classes"])) == ("false_alarms", 5, len(card.classes))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert tuned.classes == card.classes

    detector = retina.load(run, device="cpu")
    images = sorted((tiny_data / "val").iterdir())
    everything = detector.predict(images, score_threshold=0.05)
    first = int(everything[0].labels[-1])
    detector.card.operating_point["classes"][first]["threshold"] = 0.99
    kept = detector.predict(images)
    assert all((image.scores[image.labels == first] >= 0.99).all() for image in kept)
    limits = torch.tensor(detector.thresholds)
    for found, image in zip(kept, everything, strict=True):
        assert torch.equal(found.scores, image.scores[image.scores >= limits[image.labels]])
    assert len(torch.cat([image.scores for image in kept])) > 0

    words = [f"checkpoint={run}", f"source={tiny_data / 'val'}", "pictures=false", "device=cpu"]
    assert tool("infer", *words, f"output={tmp_path / 'tuned'}") == 0
    assert tool("infer", *words, f"output={tmp_path / 'typed'}", "score_threshold=0.05") == 0
    tuned_scores, typed_scores = (
        {
            (record["file_name"], name, score)
            for record in images_found(tmp_path / folder)
            for name, score in zip(record["classes"], record["scores"], strict=True)
        }
        for folder in ("tuned", "typed")
    )
    limit = dict(zip(card.classes, retina.load(run, device="cpu").thresholds, strict=True))
    assert tuned_scores == {one for one in typed_scores if one[2] >= limit[one[1]]} != typed_scores


def test_another_goal_into_another_file(tool: Tool, run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = (run / "best.safetensors").read_bytes()
    words = [f"checkpoint={run}", "goal=recall", "target=0.99", f"output={tmp_path / 'w.safetensors'}"]
    assert tool("tune_thresholds", *words, "device=cpu") == 0
    assert (run / "best.safetensors").read_bytes() == before
    point = read_card(tmp_path / "w.safetensors").operating_point
    assert (point["goal"], point["target"]) == ("recall", 0.99)
    assert "operating point for recall 0.99" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["split=test"], ["goal=luck"], ["goal=recall", "target=2"]])
def test_a_goal_that_there_is_not(tool: Tool, run: Path, words: list[str], capsys: Capture) -> None:
    before = (run / "best.safetensors").read_bytes()
    assert tool("tune_thresholds", f"checkpoint={run}", *words) == 2
    assert words[-1].partition("=")[0] in one_line(capsys)
    assert (run / "best.safetensors").read_bytes() == before
