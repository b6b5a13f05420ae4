"""A packed data set is trained on, scored and looked over as its files are; packing survives a kill."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cli.test_train import ENVIRONMENT, ROOT, run, tiny
from commands import Capture, Tool, digest, refused_by_tool
from programs import Program
from retina.data.packs import INDEX
from retina.data.shapes import write_shapes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    write_shapes(folder / "shapes", num_train=10, num_val=4, image_size=(64, 96))
    return folder


@pytest.fixture(scope="module")
def packed(place: Path, tool: Tool) -> Path:
    before = digest(place / "shapes")
    assert tool("pack", f"data.root={place}/shapes", f"output={place}/packed") == 0
    assert digest(place / "shapes") == before
    return place / "packed"


def test_nothing_but_the_pack_is_left(packed: Path, place: Path, tool: Tool, capsys: Capture) -> None:
    assert {file.name for file in packed.iterdir()} == {"annotations", "train", "val"}
    assert {file.name for file in (packed / "train").iterdir()} == {"00000.tar", INDEX}
    name = "annotations/instances_train.json"
    assert (packed / name).read_bytes() == (place / "shapes" / name).read_bytes()
    before = digest(packed)
    assert tool("pack", f"data.root={place}/shapes", f"output={packed}") == 0
    assert digest(packed) == before
    assert "each as it was packed" in capsys.readouterr().out


def test_training_from_a_pack_ends_with_the_same_bits(packed: Path, place: Path) -> None:
    """Also killed and resumed, with workers, and begun from the files."""
    ends = {}
    for name, root, workers in (("files", "shapes", 0), ("pack", "packed", 2)):
        words = tiny(name, **{"data.root": root, "data.num_workers": workers, "train.pictures": 0})
        if name == "pack":
            program = Program(ROOT / "tools/train.py", *words, cwd=place, **ENVIRONMENT)
            while program.poll() is None and not (place / "runs/pack/checkpoints/step_00000003").is_dir():
                time.sleep(0.001)
            program.kill()
            program.wait(1000)
        done = run(*words, folder=place)
        assert done.returncode == 0, done.stderr
        ends[name] = load_file(place / f"runs/{name}/checkpoints/step_00000006/model.safetensors")
    for name, tensor in ends["files"].items():
        np.testing.assert_array_equal(ends["pack"][name].numpy(), tensor.numpy())
    metrics = [(place / f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ends]
    losses = [[json.loads(line).get("loss") for line in lines] for lines in metrics]
    assert losses[0] == losses[1]


def test_a_pack_is_looked_over_and_inferred_on(
    packed: Path, place: Path, trained_run: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("shapes", "packed"):
        assert tool("doctor", f"data.root={place}/{root}", f"output={root}.json", "plots=false") == 0
        words = [f"checkpoint={trained_run}", f"source={place}/{root}/val", f"output={root}", "device=cpu"]
        assert tool("infer", *words) == 0
    assert digest(tmp_path / "packed") == digest(tmp_path / "shapes")
    reports = [json.loads((tmp_path / f"{root}.json").read_text()) for root in ("shapes", "packed")]
    assert reports[0]["warnings"] == [line.replace("/packed/", "/shapes/") for line in reports[1]["warnings"]]
    assert tool("eval", f"checkpoint={trained_run}", f"data.root={packed}", "output=scores", "device=cpu") == 0


def test_a_missing_image_is_found_in_a_pack_too(packed: Path, tool: Tool, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    file = tmp_path / "packed" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "elsewhere.png"
    file.write_text(json.dumps(content))
    words = [f"data.root={tmp_path}/packed", f"output={tmp_path}/report.json", "plots=false"]
    assert tool("doctor", *words) == 2
    assert "elsewhere.png" in capsys.readouterr().out


def test_killed_and_started_again_it_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    words = [ROOT / "tools/pack.py", f"data.root={tmp_path}/data"]
    write_shapes(tmp_path / "data", num_train=40, num_val=2, image_size=(400, 600))
    clean = Program(*words, f"output={tmp_path}/clean", "shard_size=1", cwd=tmp_path)
    assert clean.wait(1000) == 0
    expected = digest(tmp_path / "clean")
    archives = sum(name.endswith(".tar") for name in expected)
    output, kills = tmp_path / "killed", 0
    for wanted in range(1, archives):
        program = Program(*words, f"output={output}", "shard_size=1", cwd=tmp_path)
        while program.poll() is None and len([*output.glob("*/*.tar")]) < wanted:
            time.sleep(0.0005)
        program.kill()
        program.wait(1000)
        kills += program.returncode != 0
    assert kills
    inodes = {
        file: os.stat(file).st_ino for file in output.glob("*/*.tar") if (file.parent / f".{file.stem}.json").exists()
    }
    last = Program(*words, f"output={output}", "shard_size=1", cwd=tmp_path)
    assert last.wait(1000) == 0
    assert digest(output) == expected
    assert {file: os.stat(file).st_ino for file in inodes} == inodes, "what was finished is not written again"


def test_mistakes_are_one_line(packed: Path, place: Path, tool: Tool, tmp_path: Path, capsys: Capture) -> None:
    root, taken = f"data.root={place}/shapes", tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    write_shapes(tmp_path / "other", num_train=3, num_val=2, image_size=(64, 96))
    for words, code, named in [
        ([root, f"output={place}/shapes/train/x"], "output-in-data", "output"),
        ([root, f"output={taken}"], "output-taken", taken),
        ([root, f"output={taken}/mine"], "output-taken", taken),
        ([root, f"output={tmp_path}/x", "shard_size=0"], "out-of-range", "shard_size"),
        ([root, f"output={tmp_path}/x", "data.train.fraction=0.5"], "contradiction", "data.train"),
        ([f"data.root={tmp_path}/other", f"output={packed}"], "output-taken", packed),
    ]:
        before = digest(packed)
        assert tool("pack", *words) == 2
        refused_by_tool(capsys, code, named)
        assert digest(packed) == before
    next((tmp_path / "other" / "val").iterdir()).unlink()
    assert tool("pack", f"data.root={tmp_path}/other", f"output={tmp_path}/y") == 2
    assert not (tmp_path / "y").exists()
