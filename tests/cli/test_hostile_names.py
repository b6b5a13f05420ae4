"""Programs on a terminal that knows ASCII only, with names that hold escape sequences and letters of other scripts."""

import json
import re
import shutil
import string
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from programs import Program
from tiny import write_tiny_run

ROOT = Path(__file__).parents[2]
NAME = "caf\u00e9 \u732b\x1b[31m\u202e\x1b]0;owned\x07"
SHOWN = ascii(NAME)[1:-1]
PRINTED = set(string.printable) - set("\r\x0b\x0c\t")


@pytest.fixture(scope="module")
def place(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with such a class and, where a name may be one, such a file; a run that was trained on it; YOLO labels."""
    folder = tmp_path_factory.mktemp("names")
    shutil.copytree(tiny_data, folder / "data")
    for split in ("train", "val"):
        file = folder / "data" / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        document["categories"][0]["name"] = NAME
        file.write_text(json.dumps(document))
    write_tiny_run(folder / "run", folder / "data")
    photos = folder / "photos"
    photos.mkdir()
    (photos / f"{NAME}.jpg").write_bytes(b"no image")
    shutil.copy(next((tiny_data / "val").iterdir()), photos / f"{NAME} 2.jpg")
    for split in ("train", "val"):
        images, labels = (folder / "yolo" / kind / split for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        shutil.copy(next((tiny_data / split).iterdir()), images / f"{split} {NAME}.jpg")
        (labels / f"{split} {NAME}.txt").write_text("0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n")
    names = json.dumps([NAME])
    (folder / "yolo" / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    return folder


def said(name: str, *words: str, place: Path, code: int = 0) -> str:
    program = Program(ROOT / "tools" / f"{name}.py", *words, cwd=place, PYTHONIOENCODING="ascii", COLUMNS=200)
    out, err = program.communicate(timeout=1000)
    assert program.returncode == code, err
    assert "Traceback" not in err
    assert set(out + err) <= PRINTED
    return out + err


def test_train(place: Path) -> None:
    words = ["model.fpn_channels=16", "model.head_convs=1", "train.length=2", "train.batch_size=2", "train.device=cpu"]
    words += ["data.short_side=64", "data.long_side=64", "data.num_workers=0", "data.root=data", "data=coco", "name=x"]
    text = said("train", "model.backbone=resnet18", "model.weights=null", *words, place=place)
    assert SHOWN in text
    assert "finished at step 2" in text


def test_eval(place: Path) -> None:
    assert SHOWN in said("eval", "checkpoint=run", "output=eval", place=place)


def test_infer(place: Path) -> None:
    text = said("infer", "checkpoint=run", "source=photos", "output=out", "pictures=false", place=place, code=3)
    assert f"skipped: photos/{SHOWN}.jpg" in text


def test_doctor(place: Path) -> None:
    text = said("doctor", "data.root=data", "data=coco", place=place)
    assert any(line.startswith(SHOWN) for line in text.splitlines())


def test_convert(place: Path) -> None:
    text = said("convert", "format=yolo", "source=yolo", "output=coco", "on_error=skip", place=place)
    assert f"1 classes: {SHOWN}" in text
    assert f"val {SHOWN}.txt" in text


@pytest.mark.parametrize(
    "words",
    [
        ["tools/eval.py", "--help"],
        ["tools/eval.py", "--cfg", "job"],
        ["tools/eval.py", "-m", "checkpoint=a,b", "--unknown=caf\u00e9\x1b"],
        ["tools/lab.py", "--help"],
        ["-m", "retina", "--help"],
    ],
)
def test_a_pipe_that_nobody_reads_ends_every_program_without_a_word(
    words: list[str], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As `... | head` does; one of them is refused before."""
    first = words[0] if words[0] == "-m" else ROOT / words[0]
    with start(first, *words[1:], cwd=tmp_path) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        err = process.stderr.read()
    refused = words[1] == "-m"
    assert process.returncode in ((2,) if refused else (0, 141))  # argparse takes no notice
    assert re.fullmatch(r"error: .*\\x1b.*\n" if refused else "", err)
