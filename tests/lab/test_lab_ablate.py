"""Studies: every row of every one starts, what is finished is not repeated, and the table says what was measured."""

import csv
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from commands import Capture, Tool, one_line
from faults import refused
from reliability.hostile import laughs
from retina.cli import train
from retina.cli.compose import compose
from retina.data.shapes import write_shapes
from retina.lab.study import STUDIES, Job, Line, backbone_run, plan, read_study
from retina.lab.table import measure

NAMES = sorted(file.stem for file in STUDIES.glob("[!_]*.yaml"))
STUDY = """
title: Two rows
paper: nowhere
base: [model.weights=null]
rows:
  - {label: gamma 0, set: [loss.classification.gamma=0.0], published: {AP: 0.311}}
  - {label: gamma 2, set: ["loss.classification.alpha=0.25,0.5"], published: {AP: 0.340}}
  - {label: others, published: {AP: 0.355}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a study of three runs per seed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(STUDY)
    return tmp_path


@functools.cache
def jobs_of(study: str, *words: str, seeds: Sequence[int] = (0,), cumulative: bool = False) -> list[Job]:
    """Composing takes a tenth of a second per row, so once must do. Files of one name are the same in all tests."""
    name, content = read_study(study)
    _, lines = plan(name, content, words, seeds, cumulative=cumulative, runs="runs/lab", into=None)
    return [job for line in lines for job in line.jobs]


FROM_SCRATCH = "model.weights=null"


def pretend_finished(job: Job, ap: float, rare: float | None = 0.1) -> None:
    """What tools/train.py leaves behind, as far as a table reads it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.settings))
    lines = ("step 4", "finished at step 4", "longer: this way", "next: nothing")
    (job.folder / "log.txt").write_text("".join(f"2026-01-01 {line}\n" for line in lines))
    per_class = {"disc": {"AP": ap, "num_objects": 95}, "ring": {"AP": rare, "num_objects": 5}}
    per_class["none"] = {"AP": None, "num_objects": 0}
    records = [{"step": step, "kind": "train", "images_per_second": speed} for step, speed in ((2, 5.0), (4, 20.0))]
    score = {"AP": ap, "AP50": ap + 0.2, "AP75": None, "per_class": per_class}
    records += [{"step": 4, "kind": "val", **score}]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(("name", "data"), [*((name, "shapes") for name in NAMES), ("ladder", "bccd")])
def test_every_row_can_be_trained(name: str, data: str) -> None:
    jobs = jobs_of(name, f"data={data}", **({"cumulative": True} if name == "ladder" else {}))
    if (name, data) == ("ladder", "shapes"):
        jobs = [*jobs, *jobs_of(name, "data=shapes")]
    for job in jobs:
        train.check(job.settings)


def test_words_make_the_settings(place: Path) -> None:
    """The command that is printed starts the very run that is looked for."""
    jobs = jobs_of("two.yaml", "train.length=9", "data.root=elsewhere", "loss.classification.gamma=3", seeds=(0, 4))
    for job in jobs:
        assert compose("train", job.words) == job.settings
    keys = [word.partition("=")[0] for word in jobs[0].words]
    assert len(keys) == len(set(keys))
    assert [job.settings["train"]["seed"] for job in jobs[:2]] == [0, 4]
    assert [job.settings["loss"]["classification"]["gamma"] for job in jobs] == [0, 0, 3, 3, 3, 3], "a row over words"
    assert [job.settings["loss"]["classification"]["alpha"] for job in jobs] == [0.25] * 4 + [0.5] * 2
    train = jobs[0].settings["train"]
    assert (train["length"], train["eval_every"]) == (9, 9), "scored once, at the end"
    assert jobs[4].folder == Path("runs/lab/two-shapes/gamma_2_alpha_0.5-seed0")


def test_a_ladder_adds_and_single_steps_do_not(place: Path) -> None:
    rows = jobs_of("ladder", "data=shapes", cumulative=True)
    last = rows[-3].settings  # of TAL; the last two go back to one scale
    assert (last["model"]["head_norm"], last["train"]["ema"], last["loss"]["box_weight"]) == ("group", 0.98, 2.0)
    assert last["augment"]["resize"]["short_side"] == [96, 112, 128, 144, 160]
    alone = jobs_of("ladder", "data=shapes")[-3].settings
    assert (alone["model"]["head_norm"], alone["train"]["ema"]) == (None, None)
    assert alone["loss"]["assigner"] == last["loss"]["assigner"]
    assert rows[0].settings == jobs_of("ladder", "data=shapes")[0].settings


def test_each_step_is_an_experiment_with_those_before_it(place: Path) -> None:
    """What a row measures is what its experiment trains, but for the levels and the digits of the three scales."""
    data = ["data=coco", "data.root=x"]
    rows = [row for row in read_study("ladder")[1].rows if row.set is not None or row.experiment is not None]
    names = [row.experiment or "ladder_start" for row in rows[:10]]
    steps = ["giou", "group_norm", "p6_from_c5", "adamw", "multiscale", "ema", "atss", "gfl", "tal"]
    assert names == [f"ladder_{step}" for step in ["start", *steps]]
    for name, job in zip(names, jobs_of("ladder", *data, cumulative=True), strict=False):
        its = compose("train", [*data, f"experiment={name}"])
        for part in ("augment", "loss", "model", "optimizer", "train"):
            other = ("levels", "anchor_scales", "eval_every", "save_every", "keep_checkpoints", "pictures")
            trained, measured = ({k: v for k, v in of[part].items() if k not in other} for of in (its, job.settings))
            assert trained == measured, (name, part)
        scales = its["model"]["anchor_scales"]
        assert scales == pytest.approx(job.settings["model"]["anchor_scales"], abs=1e-3), name


def test_runs_start_from_a_backbone_that_is_trained_first(place: Path) -> None:
    """Once for all studies; not where no run wants it."""
    (place / "short.yaml").write_text("title: Short\nrows: [{label: one, set: []}]\n")
    name, study = read_study("short.yaml")
    for words, wanted in [((), 1), (("data=bccd",), 1), ((FROM_SCRATCH,), 0), (("experiment=shapes",), 0)]:
        words = (*words, "train.length=9")
        _, lines = plan(name, study, words, (0,), cumulative=False, runs="runs/lab", into=None)
        found = backbone_run(lines, "runs/lab")
        assert len(found) == wanted
        for job in found:
            assert compose("train", job.words) == job.settings
            assert str(job.folder / "best.safetensors") == lines[0].jobs[0].settings["model"]["weights"]
            assert job.settings["train"]["length"] != 9, "the budget is that of the study's runs"


def test_image_scale_is_a_factor_on_the_data() -> None:
    jobs = jobs_of("depth", "data=shapes")
    sides = [(job.settings["data"]["short_side"], job.settings["data"]["long_side"]) for job in jobs]
    assert sides == [(96, 120), (128, 160), (192, 240)] * 2
    assert jobs[0].settings["augment"]["resize"]["short_side"] == 96, "what refers to the size follows"


def test_data_are_recipes_groups_or_experiments(place: Path) -> None:
    for words, begin, name in [
        ([], ["experiment=shapes"], "two-shapes"),
        (["data=bccd"], ["experiment=bccd", "data.root=data/bccd"], "two-bccd"),
        (["data=coco", "data.root=DIR"], ["data=coco", "data.root=DIR", "experiment=paper"], "two-coco"),
        (["experiment=overfit"], ["experiment=overfit"], "two-overfit"),
    ]:
        job = jobs_of("two.yaml", *words)[0]
        assert set(begin) <= set(job.words)
        assert job.folder.parent.name == name


def test_a_finished_run_is_one_of_these_settings(place: Path) -> None:
    job = jobs_of("two.yaml")[0]
    assert not job.finished()
    pretend_finished(job, 0.3)
    assert job.finished()
    with (job.folder / "log.txt").open("a") as log:
        log.write("2026-01-01 resumed at step 4\n2026-01-01 step 6\n")  # the same command with more steps
    assert not job.finished()
    pretend_finished(job, 0.3)
    other = job._replace(settings=job.settings | {"train": job.settings["train"] | {"length": 7}})
    assert not other.finished()
    earlier = {key: value for key, value in job.settings["train"].items() if key != "max_unsaved_minutes"}
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.settings | {"train": earlier}))
    assert job.finished(), "what an earlier version did not know has its default"
    changed = job.settings | {"train": job.settings["train"] | {"max_unsaved_minutes": 7}}
    assert not job._replace(settings=changed).finished()
    (job.folder / "log.txt").write_text("2026-01-01 told to stop: saved at step 2, the same command goes on\n")
    assert not job.finished()


def test_the_table_of_finished_runs(tool: Tool, place: Path, capsys: Capture) -> None:
    """Nothing is trained: all runs are there."""
    for job, ap in zip(jobs_of("two.yaml", seeds=(0, 1)), (0.1, 0.3, 0.2, 0.2, 0.25, 0.35), strict=True):
        pretend_finished(job, ap)
    command = ("lab", "ablate", "study=two.yaml", "seeds=[0,1]", "output=out")
    assert tool(*command) == 0
    assert capsys.readouterr().out == "6 runs, 6 of them finished\nwritten: out/two-shapes.md, two-shapes.csv\n"
    text = Path("out/two-shapes.md").read_text()
    lines = text.splitlines()
    assert "mean ± standard deviation over seeds 0, 1." in lines[2]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == [
        "setting", "runs", "AP", "AP50", "AP75", "AP of ring, 5%", "training, ms per image", "published AP"
    ]  # fmt: skip
    zero = "0.000 ± 0.000"
    assert table[2:] == [
        ["gamma 0", "2 of 2", "0.200 ± 0.141", "0.400 ± 0.141", zero, "0.100 ± 0.000", "50.0", "0.311"],
        ["gamma 2, alpha 0.25", "2 of 2", "0.200 ± 0.000", "0.400 ± 0.000", zero, "0.100 ± 0.000", "50.0", ""],
        ["**gamma 2, alpha 0.5**", "2 of 2", "0.300 ± 0.071", "0.500 ± 0.071", zero, "0.100 ± 0.000", "50.0", "0.340"],
        ["others", "", "", "", "", "", "", "0.355"],
    ]
    assert "python tools/lab.py ablate study=two.yaml 'seeds=[0,1]' output=out" in lines
    assert sum(line.startswith("python tools/train.py ") for line in lines) == 3
    with Path("out/two-shapes.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [record["AP_runs"] for record in records[:3]] == [
        "0.100000 0.300000",
        "0.200000 0.200000",
        "0.250000 0.350000",
    ]
    assert [record["best_of_row"] for record in records] == ["", "0", "1", ""]
    assert tool(*command) == 0
    assert Path("out/two-shapes.md").read_text() == text


def test_a_run_without_records_is_no_measurement(place: Path) -> None:
    jobs = jobs_of("two.yaml", seeds=(0, 1))[:2]
    pretend_finished(jobs[0], 0.3)
    pretend_finished(jobs[1], 0.4)
    (jobs[1].folder / "metrics.jsonl").unlink()
    (found,) = measure([Line("two", "two", {}, jobs)])
    assert len(found.milliseconds) == 1
    assert found.metrics["AP"] == [0.3]


def test_what_fails_is_told_and_the_rest_goes_on(tool: Tool, place: Path, capsys: Capture) -> None:
    """One run cannot have its folder; the other is finished."""
    rows = "rows:\n  - {label: bad, set: []}\n  - {label: good, set: []}\n"
    Path("bad.yaml").write_text(f"title: Bad\nbase: [{FROM_SCRATCH}]\n{rows}")
    bad, good = jobs_of("bad.yaml")
    pretend_finished(good, 0.3)
    bad.folder.touch()
    assert tool("lab", "ablate", "study=bad.yaml", "seeds=[0]", "output=out") == 2
    out, err = capsys.readouterr()
    fault = f"{bad.folder}: is a file - choose another name=..."
    assert err.splitlines()[-1] == f"error[runs-failed]: 1 of 2 runs failed, as bad-seed0 did: {fault}"
    assert out.splitlines()[0] == "2 runs, 1 of them finished"
    text = Path("out/bad-shapes.md").read_text()
    assert f"- bad-seed0: {fault}" in text
    assert "1 of 2 runs so far." in text


def test_runs_of_other_settings_are_told_before_any_starts(tool: Tool, place: Path, capsys: Capture) -> None:
    job = jobs_of("two.yaml")[2]
    pretend_finished(job, 0.3)
    (job.folder / "best.safetensors").touch()
    assert tool("lab", "ablate", "study=two.yaml", "seeds=[0]", "output=out", "optimizer.lr=0.5") == 2
    assert one_line(capsys) == (
        f"error: {job.folder}: holds another run: optimizer.lr: 0.001 there, 0.5 now - give into=NAME for a new study, "
        "repeat its settings, or remove that folder"
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "study: missing - give study=..."),
        (["study=gama"], "study: gama: no such study - choose one of alpha, anchors, depth, gamma, ladder, ohem, or "),
        (["study=two.yaml", "seeds=[]"], "seeds: [] is not allowed"),
        (["study=two.yaml", "seeds=[1,1]"], "seeds: [1, 1] is not allowed"),
        (["study=two.yaml", "seeds=[-1]"], "seeds: [-1] is not allowed - give whole numbers of 0 or more"),
        (["study=two.yaml", "budget=0"], "gamma 0: train.length: 0 is not allowed - give steps"),
        (["study=two.yaml", "budget=-5"], "gamma 0: train.length: -5 is not allowed - give steps"),
        (["study=two.yaml", "train.length=0"], "gamma 0: train.length: 0 is not allowed - give steps"),
        (["study=later.yaml"], "second: loss.classification: gamma must be finite and at least 0, got -1"),
        (["study=two.yaml", "optimizer.lr=abc"], "gamma 0: optimizer: "),
        (["study=two.yaml", "model.head_quality=true"], "gamma 0: loss: the head has a quality branch, which nothing"),
        (["study=two.yaml", "schedule.warmup=-5"], "gamma 0: schedule.warmup: -5 is not allowed"),
        (["study=two.yaml", "data=coco"], "gamma 0: data.root: missing - give data.root=DIR"),
        (["study=two.yaml", "data=coco", "data.root=nowhere"], "gamma 0: nowhere: split 'train': expected "),
        (["study=scale.yaml"], "scale.yaml: study.rows.0.image_scale: nan is not allowed - give a factor above 0"),
        (["study=tiny.yaml"], "a: data.short_side: 0 is not allowed - give "),
        (["study=two.yaml", "sead=3"], "sead: no such key"),
        (["study=two.yaml", "seds=[0]"], "seds: no such key - did you mean seeds?"),
        (["study=two.yaml", "optimizer.lrr=3"], "optimizer.lrr: no such key - did you mean optimizer.lr?"),
        (["study=two.yaml", "data=cocoo"], "data=cocoo: no such option - choose one of coco, shapes"),
        (["study=two.yaml", "name=x"], "name: every run has its own - give into=NAME"),
        (["study=two.yaml", "train.seed=3"], "train.seed: every run has its own - give seeds=[0,1,2]"),
        (["study=two.yaml", "into=../x"], "into: ../x is no name of a folder"),
        (["study=two.yaml", "output=taken"], "output: taken/two-shapes.md is there already and is no table of this"),
        (["study=row.yaml"], "row.yaml: study.rows.0.lable: no such key - did you mean study.rows.0.label?"),
        (["study=word.yaml"], "word.yaml: study.rows.0.set: [3] is of the wrong type - give list[str]"),
        (["study=words.yaml"], "words.yaml: study.data: {'shapes': 'a=1'} is of the wrong type - give dict[str, list"),
        (["study=same.yaml"], "same.yaml: rows: none, or two of one label"),
        (["study=yaml.yaml"], "yaml.yaml: "),
        (["study=lost.yaml"], "study: experiment: ladder_gfll: no such file in "),
    ],
)
def test_mistakes_are_one_line(tool: Tool, place: Path, capsys: Capture, words: list[str], wanted: str) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "two-shapes.md").write_text("# mine\n")
    (place / "row.yaml").write_text("title: x\nrows: [{lable: a}]\n")
    (place / "word.yaml").write_text("title: x\nrows: [{label: a, set: [3]}]\n")
    (place / "words.yaml").write_text("title: x\nrows: [{label: a, set: []}]\ndata: {shapes: a=1}\n")
    rows = "{label: first, set: []}, {label: second, set: [loss.classification.gamma=-1.0]}"
    (place / "later.yaml").write_text(f"title: x\nrows: [{rows}]\n")
    (place / "scale.yaml").write_text("title: x\nrows: [{label: a, set: [], image_scale: .nan}]\n")
    (place / "tiny.yaml").write_text("title: x\nrows: [{label: a, set: [], image_scale: 0.001}]\n")
    (place / "same.yaml").write_text("title: x\nrows: [{label: a}, {label: a}]\n")
    (place / "lost.yaml").write_text("title: x\nrows: [{label: a, experiment: ladder_gfll}]\n")
    (place / "yaml.yaml").write_text("title: [\n")
    assert tool("lab", "ablate", *words) == 2
    assert one_line(capsys).startswith(f"error: {wanted}")
    assert not (place / "runs").exists()
    assert not (place / "docs").exists()


TINY = (
    *("ablate", "study=two.yaml", "seeds=[0]", "budget=12", "output=out", "data.root=tiny", "data.prepare=null"),
    *("data.short_side=64", "data.long_side=96", "model.fpn_channels=32", "train.batch_size=4", "train.log_every=2"),
    *("train.save_every=2", "train.precision=fp32", FROM_SCRATCH),
)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_goes_on(
    how: signal.Signals, start: Callable[..., "subprocess.Popen[str]"], place: Path, tool: Tool, capsys: Capture
) -> None:
    write_shapes(place / "tiny", num_train=16, num_val=4, image_size=(64, 96))
    (place / "two.yaml").write_text(
        "title: Two\nrows: [{label: one, set: []}, {label: two, set: [train.clip_norm=1.0]}]\n"
    )
    one, two = (place / "runs" / "lab" / "two-shapes" / f"{row}-seed0" for row in ("one", "two"))
    deadline = time.monotonic() + 1000
    with start(Path(__file__).parents[2] / "tools" / "lab.py", *TINY, cwd=place) as study:
        while not (two / "checkpoints" / "step_00000002").is_dir():
            assert time.monotonic() < deadline
            assert study.poll() is None
            time.sleep(0.05)
        os.kill(study.pid, how)
        study.communicate()
    assert study.returncode == (-how if how == signal.SIGKILL else 128 + how)
    text = (two / "log.txt").read_text()
    assert "finished" not in text
    assert how == signal.SIGKILL or "told to stop: saved at step" in text
    before = (one / "log.txt").read_text()
    assert tool("lab", *TINY) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 runs, 1 of them finished"
    assert (one / "log.txt").read_text() == before, "not even started again"
    assert "resumed at step" in (two / "log.txt").read_text()
    table = [line for line in (place / "out" / "two-shapes.md").read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[2:]] == ["1 of 1"] * 2


@pytest.mark.slow
def test_speed_is_measured_of_what_a_launcher_trained(tool: Tool, place: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_shapes(place / "tiny", num_train=16, num_val=4, image_size=(64, 96))
    rows = "rows:\n  - {label: one, set: []}\n  - {label: two, set: [model.fpn_channels=64]}\n"
    (place / "two.yaml").write_text(f"title: Speed\nspeed: true\n{rows}")
    assert tool("lab", *TINY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == 0
    with Path("out/two-shapes.csv").open() as file:
        assert all(float(record["inference_ms"]) > 0 for record in csv.DictReader(file))
    assert "published ms" in Path("out/two-shapes.md").read_text()


@pytest.mark.parametrize("damaged", ["cut o", '{"step": 4, "step": 8}', '{"step": NaN}'])
def test_records_that_are_damaged_are_named(place: Path, damaged: str) -> None:
    (job, *_) = jobs_of("two.yaml")
    pretend_finished(job, ap=0.3)
    (job.folder / "metrics.jsonl").write_text(f"{damaged}\n")
    with refused("damaged-records", job.folder / "metrics.jsonl"):
        measure([Line(label="x", row="x", jobs=[job], published={})])


def test_a_study_of_many_aliases_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(laughs(4))
    with refused("unreadable-file", tmp_path / "bomb.yaml", "aliases"):
        read_study(str(tmp_path / "bomb.yaml"))
