import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from altered import change, paths
from children import before_each_file_call, die_at_file_call, in_child
from faults import refused
from retina.engine.checkpoint import (
    MANIFEST,
    Progress,
    find_fault,
    load_checkpoint,
    manifest,
    newest_valid,
    save_checkpoint,
)
from retina.engine.meter import Meter
from retina.engine.optim import ExponentialMovingAverage
from retina.errors import CheckpointError
from retina.model.weights import serialize


def parts(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, ExponentialMovingAverage]:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, ExponentialMovingAverage(model, 0.9)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(step)


def save(folder: Path, step: int, keep: int = 2, **changes: object) -> Path:
    model, optimizer, ema = parts()
    for i in range(step):
        update(model, optimizer, ema, i)
    progress = Progress(**{"step": step, "best": 0.25, "annotations": "abc"} | changes)
    return save_checkpoint(folder, progress, model=model, optimizer=optimizer, ema=ema, keep=keep)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, ema = parts()
    for step in range(3):
        update(model, optimizer, ema, step)
    file = save_checkpoint(tmp_path, Progress(step=3, best=0.5), model=model, optimizer=optimizer, ema=ema, keep=1)
    other, other_optimizer, other_ema = parts()
    update(other, other_optimizer, other_ema, 77)
    progress = load_checkpoint(file, model=other, optimizer=other_optimizer, ema=other_ema)
    assert progress == Progress(step=3, best=0.5)
    for step in range(3, 6):
        update(model, optimizer, ema, step)
        update(other, other_optimizer, other_ema, step)
    for one, two in ((model, other), (ema.model, other_ema.model)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key]), key


def test_layout_and_rotation(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    names = {path.name for path in (tmp_path / "step_00000003").iterdir()}
    assert names == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST}
    assert json.loads((tmp_path / "step_00000003/state.json").read_text())["progress"]["step"] == 3


def test_every_flipped_bit_and_every_cut_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """1000 flips of one bit and 100 cuts, each anywhere in the checkpoint."""
    record_property("tried", 1100)
    first, second = save(tmp_path, 1), save(tmp_path, 51)
    contents = {file: file.read_bytes() for file in sorted(second.iterdir())}
    places = [(file, position) for file, whole in contents.items() for position in range(len(whole))]
    generator = random.Random(0)
    for trial in range(1100):
        file, position = generator.choice(places)
        damaged = bytearray(contents[file])
        if trial < 1000:
            damaged[position] ^= 1 << generator.randrange(8)
        else:
            del damaged[position:]
        file.write_bytes(damaged)
        chosen, lines = newest_valid(tmp_path)
        assert chosen == first, (file, position)
        assert len(lines) == 1
        assert lines[0].startswith(f"{second}: {file.name} "), lines
        assert lines[0].endswith(" - ignored, going on from step_00000001: 50 steps are done again")
        file.write_bytes(contents[file])
    assert newest_valid(tmp_path) == (second, [])


def test_without_any_valid_one_all_steps_are_done_again(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "state.json").write_text("{}")
    assert newest_valid(tmp_path)[0] is None
    assert "none before it: 3 steps are done again" in newest_valid(tmp_path)[1][0]


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    (checkpoint / "ema.safetensors").unlink()
    assert "ema.safetensors" in (find_fault(checkpoint) or "")
    (checkpoint / MANIFEST).unlink()
    assert newest_valid(tmp_path)[0] is None


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    for name in (".step_00000009.tmp", ".step_00000001.old", ".step_00000001.aside.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert newest_valid(tmp_path) == (None, [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".step_00000009.tmp").mkdir()
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_what_a_kill_left_set_aside_is_put_back(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    checkpoint.rename(tmp_path / ".step_00000001.aside")
    assert newest_valid(tmp_path) == (checkpoint, [])


def test_nine_digits_are_more_than_eight(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, 0).rename(tmp_path / f"step_{step}")
    (tmp_path / "step_of_mine").mkdir()
    assert newest_valid(tmp_path)[0] == tmp_path / "step_100000000"


def test_a_kill_at_any_call_of_a_save_leaves_a_valid_checkpoint_and_no_other(tmp_path: Path) -> None:
    """Of a save that replaces one of the same step and makes an older one superfluous."""
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    model, optimizer, ema = parts()
    for fatal in range(1, 1000):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", folder)

        def saving(fatal: int = fatal, folder: Path = folder) -> None:
            die_at_file_call(fatal)
            save_checkpoint(folder, Progress(step=2, evaluated=2), model=model, optimizer=optimizer, ema=ema, keep=1)

        status = in_child(saving)
        assert status in (0, -signal.SIGKILL)
        assert newest_valid(folder) == (folder / "step_00000002", []), fatal
        assert all(find_fault(path) is None for path in folder.iterdir()), "swept, or whole"
        if status == 0:
            break
    assert 40 < fatal < 200
    assert json.loads((folder / "step_00000002" / "state.json").read_text())["progress"]["evaluated"] == 2
    assert [path.name for path in folder.iterdir()] == ["step_00000002"]


def test_everything_is_on_the_disk_before_it_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folder, then the rename, then the folder of the name; only then an older one goes."""
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def spy(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def spy_rename(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.name}")
        return rename(path, target)

    save(tmp_path / "checkpoints", 1)
    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(Path, "rename", spy_rename)
    save(tmp_path / "checkpoints", 2, keep=1)
    files = [f"sync {name}.safetensors" for name in ("model", "optimizer", "ema")]
    assert seen == [
        f"sync {tmp_path.name}",
        *files,
        "sync state.json",
        f"sync {MANIFEST}",
        "sync .step_00000002.tmp",
        "rename .step_00000002.tmp",
        "sync checkpoints",
        "rename step_00000001",
    ]


def test_a_disk_that_gives_back_other_bytes_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model, optimizer, ema = parts()

    def flip(_: int, event: str, arguments: tuple[object, ...]) -> None:
        created = event == "open" and arguments[1] is None and int(arguments[2]) & os.O_CREAT  # by `os.open`
        if created and str(arguments[0]).endswith(MANIFEST):
            file = Path(str(arguments[0])).with_name("model.safetensors")
            damaged = bytearray(file.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            file.write_bytes(damaged)

    def saving() -> None:
        before_each_file_call(flip)
        with refused("damaged-checkpoint", "step_00000002: model.safetensors", kind=CheckpointError):
            save_checkpoint(tmp_path, Progress(step=2), model=model, optimizer=optimizer, ema=ema, keep=1)

    assert in_child(saving) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_values_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for place, value in (("model", math.nan), ("ema", math.inf), ("optimizer", -math.inf)):
        model, optimizer, ema = parts()
        update(model, optimizer, ema, 0)
        tensors = {"model": model[2].weight, "ema": ema.model[2].weight}
        tensors["optimizer"] = optimizer.state[model[2].weight]["exp_avg"]
        with torch.no_grad():
            tensors[place][0, 1] = value
        name = {"optimizer": "4.exp_avg"}.get(place, "2.weight")
        with refused("not-finite", f"step_00000002: {place}: {name}", kind=CheckpointError):
            save_checkpoint(tmp_path, Progress(step=2), model=model, optimizer=optimizer, ema=ema, keep=1)
    for changes in ({"best": math.nan}, {"meter": [1.0, math.inf]}, {"scaler": {"scale": math.nan}}):
        with refused("not-finite", f"progress: {next(iter(changes))}", kind=CheckpointError):
            save(tmp_path, 2, keep=1, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def rewritten(checkpoint: Path, name: str, data: bytes) -> Path:
    """The checkpoint with another file and a manifest to match."""
    (checkpoint / name).write_bytes(data)
    files = [file for file in checkpoint.iterdir() if file.name != MANIFEST]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (checkpoint / MANIFEST).write_bytes(manifest(digests))
    assert find_fault(checkpoint) is None
    return checkpoint


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "null", "[]", "3", '"progress"', "{}", '{"progress": {}, "optimizer": {}}',
        '{"progress": [], "optimizer": {}}', '{"progress": {"schema_version": 1}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": "1"}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": -1}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1.5}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": true}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1, "meter": ["x"]}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1, "best": NaN}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1, "scaler": []}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 9223372036854775808}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 2}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1, "step": 1}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1, "meter": [1, 2, 3]}, "optimizer": {}}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": {"0.exp_avg": 1}}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": {"0.step": {}}}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": []}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": {"x.y": 1}}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": {"0": 1}}',
        '{"progress": {"schema_version": 1, "step": 1}, "optimizer": {"99.step": 1}}',
        '{"progress": {"schema_version": "1", "step": 1}, "optimizer": {}}',
        "[" * 100_000, "\x00\xff",
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_one_line(tmp_path: Path, text: str) -> None:
    checkpoint = rewritten(save(tmp_path, 1), "state.json", text.encode("latin-1"))
    model, optimizer, ema = parts()
    with pytest.raises(CheckpointError, match=r"^[^\n]*step_00000001[^\n]* - [^\n]+$"):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)


def test_changed_states_are_one_line_or_work(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("tried", 400)
    meter = [1.0, 0.5, 0.25, 7.0, 1.5]
    checkpoint = save(tmp_path, 3, meter=meter, scaler={"scale": 1024.0, "_growth_tracker": 3})
    state = json.loads((checkpoint / "state.json").read_text())
    state["optimizer"] = {"0.count": 3}
    text, places, generator, outcomes = json.dumps(state), list(paths(state)), random.Random(0), Counter[str]()
    model, optimizer, ema = parts()
    for number in range(400):
        changed = json.loads(text)
        change(changed, places[number % len(places)], generator)
        if number % 2:
            change(changed, generator.choice(places), generator)
        (checkpoint / "state.json").write_text(json.dumps(changed))
        try:
            progress = load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
            update(model, optimizer, ema, progress.step)
            sums = Meter()
            sums.load_state(progress.meter, torch.device("cpu"))
            sums.read()
            outcomes["works"] += 1
        except CheckpointError as fault:
            outcomes[fault.code] += 1
        except Exception as error:
            raise AssertionError(f"{changed}") from error
    assert outcomes.keys() <= {"works", "damaged-checkpoint", "other-version", "other-model"}
    assert outcomes["damaged-checkpoint"] > 200
    assert outcomes["works"] > 20


def test_what_a_later_minor_version_adds_is_ignored_and_what_it_lacks_is_as_at_the_start(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1, evaluated=1)
    state = json.loads((checkpoint / "state.json").read_text())
    state["progress"]["weather"] = "fine"
    del state["progress"]["evaluated"]
    rewritten(checkpoint, "state.json", json.dumps(state).encode())
    model, optimizer, ema = parts()
    progress = load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
    assert progress == Progress(step=1, best=0.25, annotations="abc", evaluated=0)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_tensors_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    checkpoint = rewritten(save(tmp_path, 1), f"{name}.safetensors", b"not tensors")
    model, optimizer, ema = parts()
    with refused("damaged-checkpoint", f"{name}.safetensors", kind=CheckpointError):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)


@pytest.mark.parametrize(
    ("key", "shape"), [("0.exp_avg", [4, 4]), ("0.exp_avg", [3]), ("9.exp_avg", [4, 3]), ("exp_avg", [4, 3])]
)
def test_optimizer_tensors_must_fit_their_parameters(tmp_path: Path, key: str, shape: list[int]) -> None:
    checkpoint = rewritten(save(tmp_path, 1), "optimizer.safetensors", serialize({key: torch.zeros(shape)}))
    model, optimizer, ema = parts()
    with refused("other-model", f"optimizer.safetensors: {key} ", kind=CheckpointError):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)


@pytest.mark.parametrize("name", ["Adafactor", "SGD", "NAdam", "Rprop", "Adagrad"])
def test_other_optimizers_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, ExponentialMovingAverage]:
        model, _, ema = parts()
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.1), ema

    one, two = made(), made()
    update(*one, 0)
    saved = save_checkpoint(tmp_path, Progress(step=1), model=one[0], optimizer=one[1], ema=one[2], keep=1)
    load_checkpoint(saved, model=two[0], optimizer=two[1], ema=two[2])
    for parts_of_one in (one, two):
        update(*parts_of_one, 1)
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))


def test_other_models_and_versions_are_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    model, optimizer, ema = parts(width=5)
    with refused("other-model", "0.weight", [4, 3], [5, 3], kind=CheckpointError):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
    model, optimizer, ema = parts()
    newer = save(tmp_path, 2, schema_version=99)
    with refused("other-version", newer, "99", kind=CheckpointError):
        load_checkpoint(newer, model=model, optimizer=optimizer, ema=ema)


def test_a_checkpoint_without_average_is_refused(tmp_path: Path) -> None:
    model, optimizer, ema = parts()
    checkpoint = save_checkpoint(tmp_path, Progress(), model=model, optimizer=optimizer, ema=None, keep=1)
    with refused("missing-average", "ema.safetensors", kind=CheckpointError):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
