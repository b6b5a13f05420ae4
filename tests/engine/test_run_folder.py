from pathlib import Path

import pytest

from retina.engine.run_folder import compare, open_run, read_settings
from retina.errors import ConfigError

CONFIG = {"name": "x", "overwrite": False, "optimizer": {"lr": 0.1}, "data": {"num_workers": 2}, "levels": [3, 4]}


def test_a_new_folder_and_the_same_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    assert open_run(folder, CONFIG, overwrite=False) is False
    (folder / "best.safetensors").touch()
    assert open_run(folder, CONFIG, overwrite=False) is True
    assert open_run(folder, CONFIG | {"data": {"num_workers": 0}}, overwrite=False) is True


def test_another_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    open_run(tmp_path / "x", CONFIG, overwrite=False)
    weights = tmp_path / "x" / "checkpoints" / "step_00000001" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("precious")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    changed = CONFIG | {"optimizer": {"lr": 0.2}, "levels": [3]}
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.1 there, 0\.2 now \(and 1 more\)"):
        open_run(tmp_path / "x", changed, overwrite=False)
    assert weights.read_text() == "precious"
    assert open_run(tmp_path / "x", changed, overwrite=True) is False
    assert not weights.exists()
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_a_run_that_never_got_going_may_be_corrected(tmp_path: Path) -> None:
    open_run(tmp_path / "x", CONFIG, overwrite=False)
    open_run(tmp_path / "x", CONFIG | {"levels": [5]}, overwrite=False)
    assert read_settings(tmp_path / "x" / "config.yaml")["levels"] == [5]


def test_what_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds files but no run"):
            open_run(tmp_path, CONFIG, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "photo.jpg", CONFIG, overwrite=True)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_damaged_settings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(ConfigError, match=r"config\.yaml: is damaged"):
        open_run(tmp_path, CONFIG, overwrite=False)


def test_compare_names_keys_that_came_and_went() -> None:
    assert compare({"a": {"b": 1}}, {"a": {"c": 1}}) == ["a.b: 1 there, (absent) now", "a.c: (absent) there, 1 now"]
