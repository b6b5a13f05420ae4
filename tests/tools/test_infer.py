"""Pictures and records of a folder, an image or a glob; the unreadable is told; nothing of the user's is touched."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import retina
from retina.data.images import read_image

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tiny_data: Path, tmp_path: Path) -> Path:
    """a.jpg, sub/b.png, sub/deep/c.JPG and a text that is no image."""
    files = sorted((tiny_data / "val").iterdir())
    root = tmp_path / "photos"
    (root / "sub" / "deep").mkdir(parents=True)
    shutil.copy(files[0], root / "a.jpg")
    Image.fromarray(read_image(files[1])).save(root / "sub" / "b.png")
    shutil.copy(files[2], root / "sub" / "deep" / "c.JPG")
    (root / "notes.txt").write_text("mine")
    return root


def digest(root: Path) -> dict[str, str]:
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def records(output: Path) -> list[dict[str, Any]]:
    found = json.loads((output / "detections.json").read_text())
    assert isinstance(found, list)
    return found


def test_a_folder_is_mirrored(tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    before, output = digest(photos), tmp_path / "out"
    words = [f"checkpoint={trained_run}", f"source={photos}", "batch_size=1"]
    assert tool("infer", *words, f"output={output}") == 0
    assert digest(photos) == before
    assert sorted(digest(output)) == ["a.jpg", "detections.json", "sub/b.png", "sub/deep/c.JPG"]
    out, err = capsys.readouterr()
    total = sum(len(record["boxes"]) for record in records(output))
    assert (out, err) == (f"3 images, {total} objects of score 0.3 or more: {output}\n", "")

    detector = retina.load(trained_run)
    for record in records(output):
        image = read_image(photos / record["file_name"])
        assert (record["height"], record["width"]) == image.shape[:2]
        (found,) = detector.predict([image], score_threshold=0.3)
        assert len(found.scores) > 0
        np.testing.assert_allclose(record["boxes"], found.boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(record["scores"], found.scores, rtol=0, atol=1e-5)
        assert record["classes"] == [detector.classes[k] for k in found.labels]
        drawn = read_image(output / record["file_name"])
        assert max(drawn.shape) == 768
    assert [record["file_name"] for record in records(output)] == ["a.jpg", "sub/b.png", "sub/deep/c.JPG"]

    assert tool("infer", *words, f"output={output}", "score_threshold=0.9") == 0  # an earlier inference is replaced
    assert all(score > 0.9 for record in records(output) for score in record["scores"])


def test_one_image_and_a_glob(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"checkpoint={trained_run}", "pictures=false"]
    assert tool("infer", *words, f"source={photos}/sub/b.png", f"output={tmp_path}/one") == 0
    assert [record["file_name"] for record in records(tmp_path / "one")] == ["b.png"]
    assert list(digest(tmp_path / "one")) == ["detections.json"]
    monkeypatch.chdir(photos)
    assert tool("infer", *words, 'source="**/*.[jp][pn]g"', "output=../two") == 0
    assert [record["file_name"] for record in records(tmp_path / "two")] == ["a.jpg", "sub/b.png"]
    assert tool("infer", *words, "source=sub/*/*", "output=../three") == 0
    assert [record["file_name"] for record in records(tmp_path / "three")] == ["c.JPG"]


def test_an_unreadable_file_is_told_and_the_rest_is_done(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    (photos / "b_broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:500])
    (photos / "c_empty.png").write_bytes(b"")
    output = tmp_path / "out"
    assert tool("infer", f"checkpoint={trained_run}", f"source={photos}", f"output={output}") == 3
    out, err = capsys.readouterr()
    assert out.startswith("3 images, ")
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{photos}/b_broken.jpg", f"{photos}/c_empty.png"]
    assert all(line.startswith("skipped: ") for line in lines)
    assert len(records(output)) == 3
    assert sorted(digest(output)) == ["a.jpg", "detections.json", "sub/b.png", "sub/deep/c.JPG"]

    (tmp_path / "bad").mkdir()
    shutil.copy(photos / "c_empty.png", tmp_path / "bad")
    assert tool("infer", f"checkpoint={trained_run}", f"source={tmp_path}/bad", f"output={tmp_path}/none") == 3
    assert records(tmp_path / "none") == []


def test_output_inside_the_source_is_not_fed_back(tool: Tool, trained_run: Path, photos: Path) -> None:
    words = [f"checkpoint={trained_run}", f"source={photos}", f"output={photos}/found"]
    for _ in range(2):
        assert tool("infer", *words) == 0
        assert [record["file_name"] for record in records(photos / "found")] == ["a.jpg", "sub/b.png", "sub/deep/c.JPG"]


def test_formats_that_cannot_be_written_become_jpeg(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "a.jpg").rename(photos / "a.dat")
    words = [f"checkpoint={trained_run}", f"source={photos}/a.dat", f"output={tmp_path}/out"]
    assert tool("infer", *words) == 0
    assert tool("infer", *words) == 0
    assert sorted(digest(tmp_path / "out")) == ["a.dat.jpg", "detections.json"]


def one_line(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_users_images_are_never_overwritten(tool: Tool, trained_run: Path, photos: Path, capsys: Capture) -> None:
    checkpoint = f"checkpoint={trained_run}"
    before = digest(photos)
    for source, output, problem in [
        (photos, photos, "holds other files"),
        (f"{photos}/*.jpg", photos, "holds other files"),
        (photos / "sub" / "deep", photos, "holds other files"),
        (photos, photos / "a.jpg", "cannot be written"),
        (photos, photos / "a.jpg" / "out", "cannot be written"),
    ]:
        assert tool("infer", checkpoint, f"source={source}", f"output={output}") == 2
        assert problem in one_line(capsys)
    assert digest(photos) == before

    # a folder that passes for that of an earlier inference
    (photos / "detections.json").write_text(json.dumps([{"file_name": "x.jpg"}]))
    before = digest(photos)
    shutil.copy(photos / "sub" / "b.png", photos / "b.png")
    for source in (photos, photos / "sub"):
        assert tool("infer", checkpoint, f"source={source}", f"output={photos}") == 2
        assert "would be overwritten" in one_line(capsys)
    (photos / "b.png").unlink()
    assert digest(photos) == before


def test_mistakes_are_one_line(tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint, source, output = f"checkpoint={trained_run}", f"source={photos}", f"output={tmp_path}/out"
    for words, parts in [
        ([], ["checkpoint: missing", "source: missing"]),
        ([checkpoint, f"source={tmp_path}/nowhere"], ["nowhere: no images there"]),
        ([checkpoint, f"source={tmp_path}/empty"], ["empty: no images there"]),
        ([checkpoint, f"source={tmp_path}/*.jpg"], ["*.jpg: no images there"]),
        ([f"checkpoint={tmp_path}/nowhere", source], ["nowhere: no such file"]),
        ([checkpoint, source, "score_threshold=1.5"], ["score_threshold: 1.5"]),
        ([checkpoint, source, "score_threshold=high"], ["score_threshold: 'high' is of the wrong type - give float"]),
        ([checkpoint, source, "batch_size=0"], ["batch_size: 0"]),
        ([checkpoint, source, "device=tpu7"], ["device: "]),
        ([checkpoint, source, "precision=int8"], ["precision: 'int8'"]),
        ([checkpoint, source, "treshold=1"], ["treshold: no such key"]),
    ]:
        assert tool("infer", *words, output) == 2, words
        line = one_line(capsys)
        assert all(part in line for part in parts), (words, line)
    assert not (tmp_path / "out").exists()


def test_two_processes_share_the_work(tool: Tool, trained_run: Path, tmp_path: Path, two_processes: Path) -> None:
    words = [f"checkpoint={trained_run}", f"source={two_processes}/photos", "batch_size=1", "device=cpu"]
    assert tool("infer", *words, f"output={tmp_path}/one") == 3
    one, two = records(tmp_path / "one"), records(two_processes / "infer")
    assert [record["file_name"] for record in one] == [record["file_name"] for record in two]
    assert [record["classes"] for record in one] == [record["classes"] for record in two]
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
    assert digest(tmp_path / "one").keys() == digest(two_processes / "infer").keys()
    assert (two_processes / "out.txt").read_text().splitlines()[-1].startswith("5 images, ")
    skipped = [line for line in (two_processes / "err.txt").read_text().splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == ["photos/broken.jpg"]
