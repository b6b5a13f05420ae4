"""The training program as a user runs it, on a tiny data set."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import Capture, Tool, refused_by_tool
from outputs import images_found
from programs import Program, run_ranks
from retina.data.shapes import write_shapes
from retina.model.weights import read_card, save_detector

ROOT = Path(__file__).parents[2]
WALL_CLOCK = {"images_per_second", "data_wait", "seconds"}


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tools/train.py"), *arguments]
    program = Program(*command, cwd=folder, **ENVIRONMENT)
    out, err = program.communicate(timeout=1000)
    return subprocess.CompletedProcess(command, program.returncode or 0, out, err)


def run_pair(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done, _ = run_ranks(ROOT / "tools/train.py", *arguments, cwd=folder, **ENVIRONMENT)
    return done


def run_torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools/train.py"), *arguments]
    settings = os.environ | ENVIRONMENT
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=settings, timeout=1000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_shapes(folder / "shapes", num_train=10, num_val=4, image_size=(64, 96))
    return folder


def tiny(name: str, /, **changes: object) -> list[str]:
    settings = {
        "name": name,
        "data.root": "shapes",
        "data.prepare": "null",
        "data.short_side": 64,
        "data.long_side": 96,
        "data.pad_multiple": 32,
        "data.canvases": "[[96,96]]",  # otherwise the padding depends on which images share a micro-batch
        "data.num_workers": 0,
        "model.norm": "group",
        "model.fpn_channels": 32,
        "model.head_convs": 1,
        "train.length": 6,
        "train.batch_size": 4,
        "train.lr_batch_size": 8,
        "train.precision": "fp32",
        "train.eval_every": 3,
        "train.save_every": 3,
        "train.log_every": 2,
        "train.pictures": 2,
        "schedule.warmup": 2,
    }
    return ["experiment=shapes", *(f"{key}={value}" for key, value in (settings | changes).items())]


@pytest.fixture
def train(place: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """As `run`, but in this process, which does not load everything again."""
    monkeypatch.chdir(place)
    return functools.partial(tool, "train")


@pytest.fixture(scope="module")
def finished(place: Path) -> subprocess.CompletedProcess[str]:
    done = run(*tiny("whole"), folder=place)
    assert done.returncode == 0, done.stderr
    return done


def records(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def test_first_lines_say_what_will_happen(finished: subprocess.CompletedProcess[str]) -> None:
    lines = finished.stdout.splitlines()
    assert lines[0].split() == ["run", "runs/whole"]
    assert lines[1].startswith("device   cpu (1 threads), fp32")
    assert lines[2].startswith("data     10 images with ")
    assert lines[3].startswith("classes  5: circle ")
    assert lines[4].endswith("M trained")
    assert lines[5] == "batch    4 images (1 process x 1 x 4), 3 steps per epoch, 6 in all"
    assert lines[6] == "lr       0.001 (0.002 for 8 images x 0.5)"
    assert "schedule.warmup" not in finished.stdout


def test_a_warm_up_longer_than_the_run_is_told(train: Tool, capsys: Capture) -> None:
    assert train(*tiny("cold", **{"schedule.warmup": 500, "train.length": 1, "train.eval_every": "null"})) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len([line for line in lines if "schedule.warmup" in line]) == 1
    assert len([line for line in lines if "few objects of" in line]) == 1  # ten images


def test_a_best_metric_without_a_value_and_an_early_stop_are_told_and_the_run_goes_on(
    train: Tool, capsys: Capture
) -> None:
    """No object is large on images of 64 x 96."""
    changes = {"train.best_metric": "APl", "train.eval_every": 1, "train.length": 3, "train.pictures": 0}
    assert train(*tiny("large", **changes, **{"train.patience": 1})) == 0
    lines = capsys.readouterr().out.splitlines()
    (first, last) = (number for number, line in enumerate(lines) if line.startswith("warning: ") and "APl" in line)
    stopped, ended = (next(n for n, line in enumerate(lines) if word in line) for word in ("stopped early", "finished"))
    assert first < stopped < last < ended
    assert "finished at step 1" in lines[ended]
    assert "train.patience" in lines[ended + 1]
    assert train(*tiny("large", **changes | {"train.length": 4})) == 0
    out = capsys.readouterr().out
    assert "train.length: 3 there, 4 now" in out
    assert "finished at step 4" in out


def test_a_deterministic_run_leaves_the_next_of_its_process_alone(train: Tool, capsys: Capture) -> None:
    assert train(*tiny("nowhere", **{"train.deterministic": "true", "data.root": "nowhere"})) == 2
    refused_by_tool(capsys, "no-such-split", "nowhere")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_head_without_its_prior_is_told(
    place: Path, finished: subprocess.CompletedProcess[str], train: Tool, capsys: Capture
) -> None:
    """At the first update, and only there; a head that has it is not talked about."""
    assert "prior" not in finished.stdout
    file = place / "runs/whole/best.safetensors"
    state, card = load_file(file), read_card(file)
    state["head.classification.predict.bias"].zero_()
    save_detector(place / "lost.safetensors", state, card)
    length = {"train.length": 2, "train.eval_every": "null", "train.log_every": 1}
    assert train(*tiny("lost", **{"init_from": "lost.safetensors", **length})) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "prior" in line]
    assert line.startswith("warning: ")


def test_run_folder_holds_what_the_plan_says(place: Path, finished: subprocess.CompletedProcess[str]) -> None:
    folder = place / "runs" / "whole"
    files = {".lock", "best.safetensors", "config.yaml", "curves.png", "environment.json", "log.txt", "metrics.jsonl"}
    assert {path.name for path in folder.iterdir()} == files | {"checkpoints", "tensorboard"}
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    steps = [(r["step"], r["kind"]) for r in records(folder)]
    assert steps == [(2, "train"), (3, "val"), (4, "train"), (6, "train"), (6, "val")]
    validation = records(folder)[-1]
    assert {"AP", "AP50", "loss", "loss_box", "per_class"} <= validation.keys()
    assert (folder / "log.txt").read_text().count("evaluation at step") == 2
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    in_weights = read_card(folder / "best.safetensors").environment
    assert in_weights.items() <= environment.items()
    assert "host" not in in_weights


def test_pictures_and_numbers_are_in_tensorboard(place: Path, finished: subprocess.CompletedProcess[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(place / "runs" / "whole" / "tensorboard"))
    board.Reload()
    pictures = {f"val/{name}" for name in ("detections", "precision_recall", "confusion")}
    assert {"train/batch", *pictures} == set(board.Tags()["images"])
    wanted = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/images_per_second",
        "val/AP",
        "val/per_class/circle/AP",
    }
    assert wanted <= set(board.Tags()["scalars"])


def test_the_same_command_again_says_it_is_finished(place: Path, finished: subprocess.CompletedProcess[str]) -> None:
    before = (place / "runs/whole/best.safetensors").stat().st_mtime_ns
    again = run(*tiny("whole"), folder=place)
    assert again.returncode == 0, again.stderr
    assert "finished at step 6" in again.stdout
    assert "step 2/6" not in again.stdout
    assert (place / "runs/whole/best.safetensors").stat().st_mtime_ns == before


def test_a_run_cut_off_goes_on_bit_for_bit(place: Path, finished: subprocess.CompletedProcess[str]) -> None:
    whole, half = place / "runs" / "whole", place / "cut" / "whole"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_00000006")  # as if cut off after step 3, leaving later records behind
    again = run(*tiny("whole", runs="cut", **{"data.num_workers": 1}), folder=place)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 3" in again.stdout
    assert records(half) == records(whole)
    for name in ("model", "ema", "optimizer"):
        one = load_file(whole / f"checkpoints/step_00000006/{name}.safetensors")
        two = load_file(half / f"checkpoints/step_00000006/{name}.safetensors")
        assert one.keys() == two.keys()
        assert all(one[key].equal(two[key]) for key in one), name


def test_joined_data_resume_bit_for_bit(place: Path, train: Tool) -> None:
    """Two files whose image ids are the same numbers, the second in part."""
    changes: dict[str, object] = {
        "data.train.annotations": "[shapes/annotations/instances_train.json,shapes/annotations/instances_val.json]",
        "data.train.images": "[shapes/train,shapes/val]",
        "data.train.fraction": "[1,0.5]",
        "train.eval_every": "null",
        "train.length": 4,
        "train.save_every": 2,
    }
    assert train(*tiny("joined", **changes)) == 0
    whole, half = place / "runs" / "joined", place / "half" / "joined"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_00000004")
    assert train(*tiny("joined", runs="half", **changes)) == 0
    one, two = (load_file(run / "checkpoints/step_00000004/model.safetensors") for run in (whole, half))
    assert all(one[key].equal(two[key]) for key in one)
    assert records(half) == records(whole)


@pytest.mark.parametrize("start_two", [run_pair, pytest.param(run_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_the_same_run(
    place: Path, train: Tool, start_two: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """With SGD, for Adam divides by the size of gradients and so magnifies the rounding of small ones."""
    changes = {"optimizer": "sgd", "optimizer.lr": 0.01, "train.ema": "null", "data.eval_batch_size": 1}
    assert train(*tiny("alone", **changes)) == 0
    done = start_two(*tiny("pair", **changes, overwrite="true"), folder=place)
    assert done.returncode == 0, done.stderr
    assert "batch    4 images (2 processes x 1 x 2)" in done.stdout
    one, two = records(place / "runs" / "alone"), records(place / "runs" / "pair")
    assert [(r["step"], r["kind"]) for r in one] == [(r["step"], r["kind"]) for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("AP") == pytest.approx(b.get("AP"), abs=1e-5)


def test_numbers_that_are_not_finite_are_named_and_end_the_run(place: Path, train: Tool, capsys: Capture) -> None:
    changes = {"optimizer": "sgd", "optimizer.lr": 1e30, "train.ema": "null", "train.eval_every": "null"}
    assert train(*tiny("wild", **changes)) == 2
    out, _ = refused_by_tool(capsys, "diverged")
    warnings = [line for line in out.splitlines() if line.startswith("warning: step")]
    assert len(warnings) == 2
    assert not (place / "runs" / "wild" / "best.safetensors").exists()
    assert not list((place / "runs" / "wild").glob("checkpoints/step_*"))
    for part in ("loss class", "gradient norm", "lr 3.335e+29", "rank 0", ".jpg)"):
        assert part in warnings[0], part


def test_changed_annotations_are_refused_unless_allowed(
    place: Path, finished: object, train: Tool, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(place / "runs" / "whole", place / "elsewhere" / "whole")
    source = json.loads((place / "shapes/annotations/instances_train.json").read_text())
    source["annotations"][0]["bbox"][2] += 0.5
    changed = {"data.train.annotations": tmp_path / "train.json", "data.train.images": place / "shapes/train"}
    (tmp_path / "train.json").write_text(json.dumps(source))
    words = tiny("whole", runs="elsewhere", **changed)
    assert train(*words) == 2
    out, _ = refused_by_tool(capsys, "data-change", "allow_data_change=true")
    assert "data.train.annotations: None there" in out
    assert train(*words, "allow_data_change=true") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("warning: ") and "annotations" in line]
    assert "finished at step 6" in out


def test_five_bad_images_of_fifty_are_listed_by_every_tool(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Two are no images, three are cut off behind a sound header, which only decoding them shows."""
    monkeypatch.chdir(tmp_path)
    write_shapes(Path("shapes"), num_train=50, num_val=1, image_size=(64, 96))
    images = sorted(Path("shapes/train").iterdir())
    bad = {images[i].name for i in (3, 14, 15, 26, 49)}
    for name in bad:
        file = Path("shapes/train", name)
        content = file.read_bytes()
        file.write_bytes(b"" if name in (images[3].name, images[49].name) else content[: len(content) // 2])
    train = {"data.val.annotations": "shapes/annotations/instances_train.json", "data.val.images": "shapes/train"}
    changes = {"data.max_bad_fraction": 0.1, "train.length": "1ep", "train.batch_size": 10, "train.eval_every": "1ep"}
    assert tool("train", *tiny("bad", **train, **changes)) == 0
    out = capsys.readouterr().out
    skipped = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert {Path(line.split(": ")[1]).name for line in skipped} == bad
    assert len(skipped) == 5, "each is told once"
    assert out.index("skipped: ") < out.index("evaluation at step 5")
    assert "finished at step 5" in out

    assert tool("eval", "checkpoint=runs/bad", "device=cpu") == 3
    err = capsys.readouterr().err
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert {Path(line.split(": ")[1]).name for line in skipped} == bad
    metrics = json.loads(Path("runs/bad/eval/metrics.json").read_text())
    objects = json.loads(Path("shapes/annotations/instances_train.json").read_text())["annotations"]
    assert metrics["skipped_images"] == 5
    assert sum(one["num_objects"] for one in metrics["per_class"].values()) == len(objects), "theirs count as missed"

    assert tool("infer", "checkpoint=runs/bad", "source=shapes/train", "output=out", "device=cpu") == 3
    err = capsys.readouterr().err
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert {Path(line.split(": ")[1]).name for line in skipped} == bad
    assert len(images_found(Path("out"))) == 45


def test_a_run_can_start_from_the_weights_of_another(
    place: Path, finished: object, train: Tool, capsys: Capture
) -> None:
    changes = {"init_from": "runs/whole", "train.length": 1, "train.eval_every": "null", "optimizer.lr": 1e-12}
    assert train(*tiny("second", **changes)) == 0
    first, second = (load_file(place / f"runs/{name}/best.safetensors") for name in ("whole", "second"))
    for key, value in first.items():
        assert second[key].allclose(value, atol=1e-6), key
    assert "runs/whole/best.safetensors" in capsys.readouterr().out
    assert train(*tiny("swapped", **changes), "remap={ring: star, star: ring}") == 0
    assert "star (ring there)" in capsys.readouterr().out
    assert train(*tiny("third", **changes | {"init_from": "runs/nowhere"})) == 2
    refused_by_tool(capsys, "no-file", "runs/nowhere")


def test_a_run_may_be_overwritten_by_one_that_starts_from_its_weights(
    place: Path, finished: object, train: Tool, capsys: Capture
) -> None:
    folder = place / "over" / "whole"
    shutil.copytree(place / "runs" / "whole", folder)
    before = (folder / "best.safetensors").read_bytes()
    changes = {"runs": "over", "init_from": "over/whole", "train.length": 1, "train.eval_every": "null"}
    words = [*tiny("whole", **changes, **{"optimizer.lr": 1e-12}), "overwrite=true"]
    assert train(*words, "data.root=nowhere") == 2
    assert (folder / "best.safetensors").read_bytes() == before, "what failed at its start has replaced nothing"
    assert train(*words) == 0
    assert "tensors are those of" in capsys.readouterr().out
    first, second = (load_file(place / f"{runs}/whole/best.safetensors") for runs in ("runs", "over"))
    for key, value in first.items():
        assert second[key].allclose(value, atol=1e-6), key
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step_00000001"]
    assert not (folder / ".replaced").exists()


def test_a_setting_that_an_earlier_version_did_not_know_has_its_default(
    place: Path, finished: object, train: Tool, capsys: Capture
) -> None:
    shutil.copytree(place / "runs" / "whole", place / "early" / "renamed")
    file = place / "early" / "renamed" / "config.yaml"
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("  clip_norm:")]
    file.write_text("".join(lines))
    assert train(*tiny("renamed", runs="early")) == 0
    assert "finished at step 6" in capsys.readouterr().out
    file.write_text("".join(lines))
    assert train(*tiny("renamed", runs="early", **{"train.clip_norm": 3.0})) == 2
    refused_by_tool(capsys, "another-run", "train.clip_norm: 10.0 there, 3.0 now")


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"train.lenght": 3}, "unknown-key", ["train.lenght: ", "train.length?"]),
        ({"train.batch_size": "many"}, "wrong-type", ["train.batch_size: 'many'", "int"]),
        ({"data.root": "nowhere"}, "no-such-split", ["nowhere"]),
        ({"name": "../bad"}, "bad-name", ["name: '../bad'"]),
        ({"name": "whole", "train.batch_size": 2}, "another-run", ["runs/whole: ", "train.batch_size: 4 there, 2 now"]),
        ({"model.frozen_stages": 2}, "contradiction", ["model.frozen_stages: 2", "model.weights"]),
        ({"model.weights": "none.pth"}, "no-file", ["none.pth: "]),
        ({"model.weights": "IMAGENET22K"}, "unknown-value", ["model.weights: 'IMAGENET22K'"]),
        ({"optimizer.lr": -1}, "wrong-value", ["optimizer: "]),
        (
            {"+optimizer.speed": 1, "+optimizer.momentun": 1},
            "unknown-key",
            ["optimizer.speed: ", "optimizer.momentun: "],
        ),
        ({"train.batch_size": 3, "train.accumulate": 2}, "batch-size", ["train.batch_size: ", "3"]),
        ({"+augment.flip.side": 1}, "unknown-key", ["augment.flip.side: "]),
        ({"model.head_quality": "true"}, "wrong-value", ["loss: ", "quality"]),
        ({"model.box_bins": 17}, "wrong-value", ["loss: ", "distribution_weight", "model=retinanet"]),
        ({"loss": "gfl", "model.head_quality": "false"}, "wrong-value", ["loss: ", "model.box_bins=17"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    finished: object, train: Tool, capsys: Capture, changes: dict[str, object], code: str, named: list[str]
) -> None:
    assert train(*tiny("bad", **changes)) == 2
    refused_by_tool(capsys, code, *named)


def test_what_makes_it_another_run_is_a_table(place: Path, finished: object, train: Tool, capsys: Capture) -> None:
    changes = {"train.batch_size": 2, "optimizer.lr": 0.5, "train.log_every": 1}
    assert train(*tiny("whole", **changes)) == 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["field", "checkpoint", "now"], ["train.batch_size", "4", "2"], ["optimizer.lr", "0.002", "0.5"]]


def test_a_faulty_run_has_no_traceback(place: Path, tmp_path: Path) -> None:
    source = json.loads((place / "shapes/annotations/instances_val.json").read_text())
    for category in source["categories"]:
        category["name"] += " of another kind"
    (tmp_path / "val.json").write_text(json.dumps(source))
    changes = {"data.val.annotations": tmp_path / "val.json"}
    done = run(*tiny("other", **changes), folder=place)
    assert done.returncode == 2
    assert "of another kind" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_blood_cells_are_learned(place: Path, bccd: Path) -> None:
    """A short run on real photographs: far too short for a good detector, long enough to find most white cells."""
    changes = {
        "name": "bccd",
        "data.short_side": 96,
        "data.long_side": 128,
        "model.anchor_sizes": "[8,16,32]",
        "model.fpn_channels": 64,
        "model.head_convs": 1,
        "train.length": 90,
        "train.eval_every": 90,
        "train.pictures": 0,
    }
    settings = [f"{key}={value}" for key, value in changes.items()]
    done = run("experiment=bccd", f"data.root={bccd}", *settings, folder=place)
    assert done.returncode == 0, done.stderr
    assert "classes  3: RBC 2381, WBC 214, Platelets 209" in done.stdout
    validation = records(place / "runs" / "bccd")[-1]
    assert validation["per_class"]["WBC"]["AP50"] > 0.3
