"""Sweeps: checked as a whole, a folder for each job, one failure does not stop the rest, Hydra's launchers and
sweepers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import refused
from retina.cli import train
from retina.cli.compose import Result, Settings, entry
from retina.cli.sweep import Outcome, folder_suffix, launch
from retina.errors import ConfigError, DataError

Task = Callable[[Settings], Any]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ending(task: Task, *words: str, check: Task = lambda settings: None) -> Any:
    with pytest.raises(SystemExit) as ended:
        entry("train", check=check)(task)(["-m", *words])
    return ended.value.code


def names_of(*words: str) -> list[str]:
    names: list[str] = []
    assert ending(lambda settings: names.append(settings["name"]), *words) == 0
    return names


def test_every_job_has_a_name_that_says_what_was_swept() -> None:
    assert names_of("name=lr", "optimizer.lr=0.1,0.2") == ["lr__optimizer.lr-0.1", "lr__optimizer.lr-0.2"]
    names = names_of("data=shapes,coco", "train.seed=range(2)", "data.root='/x/y z'")
    assert names[:2] == ["shapes__data-shapes__train.seed-0", "shapes__data-shapes__train.seed-1"]
    assert len(set(names)) == 4
    assert names_of("name=a,b") == ["a", "b"]
    assert names_of("name=2024_11_28,1e3") == ["2024_11_28", "1e3"]
    assert names_of("optimizer.lr=0.1") == ["shapes"]


def test_names_are_taken_back_by_every_program_and_never_shared() -> None:
    names = names_of("data=coco", 'data.root="sets/\u5317\u4eac","sets/\u4e0a\u6d77",a/b,a_b,"a, b","a=b",A_B,a__b')
    assert len({name.casefold() for name in names}) == 8
    assert not [name for name in names if re.search(r"[=,\s/'\"]", name)]
    assert names_of("data=coco", "data.root=a/b,zzz")[0] == next(name for name in names if "a_b-" in name)
    long = folder_suffix([f"data.root={'x' * 300}"])
    assert len(long) < 140
    assert long != folder_suffix([f"data.root={'x' * 301}"])


def test_a_sweep_is_checked_before_its_first_job(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[Any] = []
    assert ending(lambda settings: ran.append(1), "optimizer=adamw,sgd", "optimizer.momentum=0.5") == 2
    assert ending(lambda settings: ran.append(1), "train.batch_size=4,-1", check=train.check) == 2
    assert "train.batch_size=-1" in capsys.readouterr().out
    assert ending(lambda settings: ran.append(1), "model.levels=[3],[19]", check=train.check) == 2
    assert ending(lambda settings: ran.append(1), "optimizer.lr=interval(0,1)") == 2
    assert ending(lambda settings: ran.append(1), "train.seed=1,1") == 2
    assert "error[shared-folder]: runs/" in capsys.readouterr().err
    assert ran == []


def test_a_job_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def task(settings: Settings) -> Result:
        seed = settings["train"]["seed"]
        if seed == 1:
            raise DataError("x.json: it is broken - mend it", code="broken")
        if seed == 2:
            raise ZeroDivisionError("one of our own")
        return Result(3 if seed == 3 else 0, seed / 10)

    assert ending(task, "train.seed=1,2,3,4", "name=s") == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["4", "failed", "failed", "failed", "finished"]
    assert "AP 0.400" in out
    assert "runs/s__train.seed-1: x.json: it is broken" in out
    assert "error[broken]: x.json: it is broken - mend it\n" in err
    assert "ZeroDivisionError: one of our own" in err
    assert ending(lambda settings: None, "train.seed=1,2") == 0


def test_a_signal_ends_the_whole_sweep() -> None:
    ran: list[int] = []

    def task(settings: Settings) -> int:
        ran.append(settings["train"]["seed"])
        return 128 + 15

    assert ending(task, "train.seed=1,2") == 143
    assert ran == [1]


def test_no_sweep_over_several_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ending(lambda settings: None, "optimizer.lr=0.1,0.2") == 2
    assert "error[sweep-under-torchrun]: -m: " in capsys.readouterr().err


def test_outputs_of_jobs_are_apart(capsys: pytest.CaptureFixture[str]) -> None:
    outputs: list[str] = []

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            entry("infer")(lambda settings: outputs.append(settings["output"]))(["-m", "source=x", *words])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    assert run("checkpoint=a,b", "output=o") == 0
    assert outputs == ["o__checkpoint-a", "o__checkpoint-b"]
    assert run("checkpoint=a,b", "output=o.x") == 2
    assert "shared-folder" in capsys.readouterr().err


def test_programs_start_jobs_of_their_own() -> None:
    def task(settings: Settings) -> Result:
        if settings["name"] == "b":
            raise ConfigError("no - yes", code="no")
        return Result(metric=settings["optimizer"]["lr"])

    main = entry("train")(task)
    jobs = [["name=a", "optimizer.lr=0.5"], ["name=b"], ["name=2024_11_28"]]
    outcomes = list(launch(main, jobs))
    assert [outcome.job.folder for outcome in outcomes] == ["runs/a", "runs/b", "runs/2024_11_28"]
    assert [(outcome.metric, outcome.fault) for outcome in outcomes[:2]] == [(0.5, ""), (None, "no - yes")]
    assert isinstance(outcomes[2], Outcome)
    with refused("unknown-key", "optimizer.lrr"):
        next(launch(main, [["name=a"], ["optimizer.lrr=1"]]))
    with refused("shared-folder", "runs/a"):
        next(launch(main, [["name=a"], ["name=A"]]))


def task_of_a_sweeper(settings: Settings) -> Result:
    """Best at a rate of 0.3, and not to be had above 0.9."""
    if settings["optimizer"]["lr"] > 0.9:
        raise ConfigError("too fast - slow down", code="too-fast")
    Path(settings["runs"], settings["name"]).mkdir(parents=True)
    return Result(metric=1 - abs(settings["optimizer"]["lr"] - 0.3))


def test_a_real_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optimizer.lr=0.1,1.0,0.3", "name=2024_1"]
    assert ending(task_of_a_sweeper, *words) == 2
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[-3:]] == [
        ["finished", "AP", "0.800"],
        ["failed", "runs/2024_1__optimizer.lr-1.0:", "too"],
        ["finished", "AP", "1.000"],
    ]
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "2024_1__optimizer.lr-0.1",
        "2024_1__optimizer.lr-0.3",
        "2024_1__sweep",
    ]
    assert [p.name for p in Path("runs/2024_1__sweep").iterdir()] == ["multirun.yaml"]


def test_a_real_sweeper(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.sampler.seed=0"]
    words += ["hydra.sweeper.n_jobs=1", "optimizer.lr=interval(0.01,0.89)", "name=2024_11_28"]
    assert ending(task_of_a_sweeper, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "  finished  AP 0." in line]) == 8
    assert "runs/2024_11_28__optimizer.lr-0." in lines[-1]
    results = Path("runs/2024_11_28__sweep/optimization_results.yaml").read_text()
    best = float(re.findall(r"best_value: (\S+)", results)[0])
    assert f"{best:.3f}" == max(re.findall(r"AP (\S+)", "\n".join(lines)))


def test_hydra_s_folders_are_there_where_they_are_asked_for() -> None:
    with pytest.raises(SystemExit):
        entry("train")(lambda settings: None)(["name=x"])
    assert list(Path().iterdir()) == []
    with pytest.raises(SystemExit):
        entry("train")(lambda settings: None)(["hydra.run.dir=o", "hydra.output_subdir=h"])
    assert Path("o/h/overrides.yaml").is_file()
    assert ending(lambda settings: None, "hydra.sweep.dir=s", "train.seed=1,2") == 0
    assert Path("s/multirun.yaml").is_file()
