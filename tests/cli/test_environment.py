"""A run records what it was made with, in its folder and, without people and places, in the weights."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import retina
from retina.cli.environment import describe_environment, for_weights, record_environment


def test_versions_and_device() -> None:
    environment = describe_environment(torch.device("cpu"))
    assert (environment["torch"], environment["retina"]) == (torch.__version__, retina.__version__)
    assert environment["cuda"] is None
    assert environment["device"].startswith("cpu")
    assert for_weights(environment).keys() == environment.keys() - {"host", "command"}


def test_commit_of_a_checkout_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "retina" / "__init__.py"
    monkeypatch.setattr(retina, "__file__", str(package))
    assert describe_environment(torch.device("cpu"))["commit"] is None  # no checkout
    package.parent.mkdir(parents=True)
    package.write_text("")
    git = ["git", "-C", str(package.parent), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q", ".."], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    environment = describe_environment(torch.device("cpu"))
    assert (environment["commit"], environment["modified"]) == (head, False)
    package.write_text("changed = True\n")
    assert describe_environment(torch.device("cpu"))["modified"] is True


def test_every_start_of_a_run_is_one_entry(tmp_path: Path) -> None:
    for start in range(3):
        record_environment(tmp_path, {"start": start})
    assert [entry["start"] for entry in json.loads((tmp_path / "environment.json").read_text())] == [0, 1, 2]
    for damaged in ("cut o", '[{"start": 0, "start": 1}]', '[{"start": NaN}]', "[" * 100_000):
        (tmp_path / "environment.json").write_text(damaged)
        record_environment(tmp_path, {"start": 3})
        assert json.loads((tmp_path / "environment.json").read_text()) == [{"start": 3}]


def test_no_room_for_the_entry_stops_nothing(tmp_path: Path) -> None:
    record_environment(tmp_path / "not there", {"start": 0})
    assert not list(tmp_path.iterdir())
