import json
from pathlib import Path

import pytest
import torch
from torch import nn

from retina.engine.checkpoint import MANIFEST, Progress, find_fault, load_checkpoint, newest_valid, save_checkpoint
from retina.engine.ema import ExponentialMovingAverage
from retina.errors import CheckpointError


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
    ema.update(model, step)


def save(folder: Path, step: int, keep: int = 2, **changes: object) -> Path:
    model, optimizer, ema = parts()
    for i in range(step):
        update(model, optimizer, ema, i)
    progress = Progress(step=step, best=0.25, annotations="abc", **changes)  # type: ignore[arg-type]
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


def test_every_flipped_byte_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    for file in sorted(second.iterdir()):
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 0b100
            file.write_bytes(damaged)
            assert find_fault(second) is not None, (file, position)
        file.write_bytes(whole[:-1])
        chosen, faults = newest_valid(tmp_path)
        assert chosen == first, file
        assert len(faults) == 1
        assert str(second) in faults[0]
        file.write_bytes(whole)
    assert newest_valid(tmp_path) == (second, [])


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    (checkpoint / "ema.safetensors").unlink()
    assert "ema.safetensors" in (find_fault(checkpoint) or "")
    (checkpoint / MANIFEST).unlink()
    assert newest_valid(tmp_path)[0] is None


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    leftover = tmp_path / ".step_00000009.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest_valid(tmp_path) == (None, [])
    save(tmp_path, 1)
    assert not leftover.exists()


def test_other_models_and_versions_are_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    model, optimizer, ema = parts(width=5)
    with pytest.raises(CheckpointError, match=r"0\.weight is \[4, 3\], the model needs \[5, 3\].*another architecture"):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
    model, optimizer, ema = parts()
    newer = save(tmp_path, 2, schema_version=99)
    with pytest.raises(CheckpointError, match="schema version 99"):
        load_checkpoint(newer, model=model, optimizer=optimizer, ema=ema)


def test_a_checkpoint_without_average_is_refused(tmp_path: Path) -> None:
    model, optimizer, ema = parts()
    checkpoint = save_checkpoint(tmp_path, Progress(), model=model, optimizer=optimizer, ema=None, keep=1)
    with pytest.raises(CheckpointError, match="kept no moving average"):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
