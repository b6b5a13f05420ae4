"""Pictures and records of a folder, an image or a glob; the unreadable is told; nothing of the user's is touched."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retina
from children import before_each_file_call
from commands import Capture, Tool, digest, one_line, refused_by_tool
from outputs import images_found
from retina.cli.journal import OURS as OF_ALL
from retina.cli.journal import Done, read_done
from retina.data.images import read_image
from retina.data.transforms import eval_pipeline
from retina.detections import postprocess
from retina.model.weights import load_detector, save_detector


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


def test_a_folder_is_mirrored(tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    before, output = digest(photos), tmp_path / "out"
    words = [f"checkpoint={trained_run}", f"source={photos}", "batch_size=1"]
    assert tool("infer", *words, f"output={output}") == 0
    assert digest(photos) == before
    assert sorted(digest(output)) == sorted(["a.jpg", *OF_ALL, "sub/b.png", "sub/deep/c.JPG"])
    out, err = capsys.readouterr()
    total = sum(len(record["boxes"]) for record in images_found(output))
    times, summary = out.splitlines()
    assert re.fullmatch(r"ms per image: read \d+\.\d, detect \d+\.\d, draw and write \d+\.\d", times)
    assert (summary, err) == (f"3 images, {total} objects of score 0.3 or more: {output}", "")

    detector = retina.load(trained_run)
    for record in images_found(output):
        image = read_image(photos / record["file_name"])
        assert (record["height"], record["width"]) == image.shape[:2]
        (found,) = detector.predict([photos / record["file_name"]], score_threshold=0.3)
        assert len(found.scores) > 0
        np.testing.assert_allclose(record["boxes"], found.boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(record["scores"], found.scores, rtol=0, atol=1e-5)
        assert record["classes"] == [detector.classes[k] for k in found.labels]
        drawn = read_image(output / record["file_name"])
        assert max(drawn.shape) == 768
    assert [record["file_name"] for record in images_found(output)] == ["a.jpg", "sub/b.png", "sub/deep/c.JPG"]

    assert tool("infer", *words, f"output={output}", "score_threshold=0.9") == 0  # an earlier inference is replaced
    assert all(score > 0.9 for record in images_found(output) for score in record["scores"])


def test_evaluation_prediction_and_inference_find_the_same_at_any_batch_size(
    tool: Tool, trained_run: Path, tmp_path: Path
) -> None:
    """On photographs that are decoded smaller, some by an eighth, and on some that are not."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    sizes = [(1024, 512), (192, 128), (96, 64), (301, 203), (512, 768)]  # width, height
    names = [f"{number}.jpg" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=95)
    detector = retina.load(trained_run)
    assert detector.read(folder / names[0]).image.shape[:2] != (512, 1024)
    images = [
        {"id": i, "file_name": name, "width": w, "height": h}
        for i, (name, (w, h)) in enumerate(zip(names, sizes, strict=True))
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(detector.classes)]
    boxes = [{"id": 1, "image_id": 0, "category_id": 0, "bbox": [9, 9, 90, 90], "area": 8100, "iscrowd": 0}]
    content = {"images": images, "categories": categories, "annotations": boxes}
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = retina.read_coco(tmp_path / "a.json", folder)
    model, card = load_detector(trained_run / "best.safetensors", torch.device("cpu"))
    expected = detector.predict([folder / name for name in names])
    assert min(len(found.scores) for found in expected) > 3
    for batch_size in (1, 2, 5):
        output = tmp_path / f"out{batch_size}"
        words = [f"checkpoint={trained_run}", f"source={folder}", f"output={output}", f"batch_size={batch_size}"]
        assert tool("infer", *words, "score_threshold=0.05", f"pictures={str(batch_size == 5).lower()}") == 0
        loader = retina.eval_loader(annotations, eval_pipeline(64, 96), batch_size=batch_size, canvas=detector.canvas)
        scored = retina.evaluate(model, loader, annotations, postprocess=partial(postprocess, **card.postprocess))
        for number, (record, found) in enumerate(zip(images_found(output), expected, strict=True)):
            mine = scored.detections.indices == number
            for boxes, scores in (
                (record["boxes"], record["scores"]),
                (scored.detections.boxes[mine], scored.detections.scores[mine]),
            ):
                np.testing.assert_allclose(boxes, found.boxes, rtol=0, atol=2e-2)
                np.testing.assert_allclose(scores, found.scores, rtol=0, atol=1e-4)
    assert max(read_image(output / names[0]).shape) == 1024, "pictures show every pixel"


def test_one_image_and_a_glob(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"checkpoint={trained_run}", "pictures=false"]
    assert tool("infer", *words, f"source={photos}/sub/b.png", f"output={tmp_path}/one") == 0
    assert [record["file_name"] for record in images_found(tmp_path / "one")] == ["b.png"]
    assert sorted(digest(tmp_path / "one")) == sorted(OF_ALL)
    monkeypatch.chdir(photos)
    assert tool("infer", *words, 'source="**/*.[jp][pn]g"', "output=../two") == 0
    assert [record["file_name"] for record in images_found(tmp_path / "two")] == ["a.jpg", "sub/b.png"]
    assert tool("infer", *words, "source=sub/*/*", "output=../three") == 0
    assert [record["file_name"] for record in images_found(tmp_path / "three")] == ["c.JPG"]


def test_an_unreadable_file_is_told_and_the_rest_is_done(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    (photos / "b_broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:500])
    (photos / "c_empty.png").write_bytes(b"")
    output = tmp_path / "out"
    assert tool("infer", f"checkpoint={trained_run}", f"source={photos}", f"output={output}") == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("3 images, ")
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{photos}/b_broken.jpg", f"{photos}/c_empty.png"]
    assert all(line.startswith("skipped: ") for line in lines)
    assert len(images_found(output)) == 3
    assert sorted(digest(output)) == sorted(["a.jpg", *OF_ALL, "failed.txt", "sub/b.png", "sub/deep/c.JPG"])
    assert (output / "failed.txt").read_text().splitlines()[1:] == [line.removeprefix("skipped: ") for line in lines]

    (tmp_path / "bad").mkdir()
    shutil.copy(photos / "c_empty.png", tmp_path / "bad")
    assert tool("infer", f"checkpoint={trained_run}", f"source={tmp_path}/bad", f"output={tmp_path}/none") == 3
    assert images_found(tmp_path / "none") == []


def test_records_go_down_a_pipe(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images whose paths come up one: a line each, and nothing else on stdout."""
    files = [photos / "sub/b.png", photos / "a.jpg", photos / "gone.jpg"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{file}\n" for file in files)))
    words = [f"checkpoint={trained_run}", "source=-", f"output={tmp_path}/out", "json_lines=true", "pictures=false"]
    assert tool("infer", *words) == 3
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert [record["file_name"] for record in told] == ["a.jpg", "sub/b.png"]
    stored = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(told[0]["boxes"]) > 0
    assert "2 images, " in err
    assert f"skipped: {photos}/gone.jpg" in err
    assert str(told[0]["boxes"][0][0]) in json.dumps(stored)


def test_output_inside_the_source_is_not_fed_back(tool: Tool, trained_run: Path, photos: Path) -> None:
    words = [f"checkpoint={trained_run}", f"source={photos}", f"output={photos}/found"]
    for _ in range(2):
        assert tool("infer", *words) == 0
        assert [record["file_name"] for record in images_found(photos / "found")] == [
            "a.jpg",
            "sub/b.png",
            "sub/deep/c.JPG",
        ]


def test_formats_that_cannot_be_written_become_jpeg(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "a.jpg").rename(photos / "a.dat")
    words = [f"checkpoint={trained_run}", f"source={photos}/a.dat", f"output={tmp_path}/out"]
    assert tool("infer", *words) == 0
    assert tool("infer", *words) == 0
    assert sorted(digest(tmp_path / "out")) == sorted(["a.dat.jpg", *OF_ALL])


def test_users_images_are_never_overwritten(tool: Tool, trained_run: Path, photos: Path, capsys: Capture) -> None:
    checkpoint = f"checkpoint={trained_run}"
    (photos / "sub2").mkdir()
    (photos / "sub2" / "b.png").write_text("mine")
    before = digest(photos)
    for source, output, problem in [
        (photos, photos, "holds the source"),
        (f"{photos}/*.jpg", photos, "holds the source"),
        (photos / "sub" / "deep", photos, "holds the source"),
        (photos / "sub", photos / "sub2", "holds other files"),
        (photos, photos / "a.jpg", "cannot be written"),
        (photos, photos / "a.jpg" / "out", "cannot be written"),
    ]:
        assert tool("infer", checkpoint, f"source={source}", f"output={output}") == 2
        assert problem in one_line(capsys)
    assert digest(photos) == before

    # a folder that passes for that of an earlier inference
    (photos / "sub2" / "inference.json").write_text(json.dumps({"files": {"x.jpg": []}}))
    before = digest(photos)
    assert tool("infer", checkpoint, f"source={photos}/sub", f"output={photos}/sub2") == 2
    assert "would be overwritten" in one_line(capsys)
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
        ([checkpoint, source, "max_pixels=0"], ["max_pixels: 0"]),
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
    one, two = images_found(tmp_path / "one"), images_found(two_processes / "infer")
    assert [record["file_name"] for record in one] == [record["file_name"] for record in two]
    assert [record["classes"] for record in one] == [record["classes"] for record in two]
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
    assert [record["picture"] for record in one] == [record["picture"] for record in two]
    assert digest(tmp_path / "one").keys() == digest(two_processes / "infer").keys()
    assert (two_processes / "out.txt").read_text().splitlines()[-1].startswith("5 images, ")
    skipped = [line for line in (two_processes / "err.txt").read_text().splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == ["photos/broken.jpg"]


def test_exactly_the_bad_files_are_told(
    tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Of 50 images one is cut off, one empty, one a text, one a pipe, and one has more pixels than allowed."""
    good, source, output = sorted((tiny_data / "val").iterdir()), tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number in range(50):
        shutil.copy(good[number % 5], source / f"{number:02}.jpg")
    bad = ["03.jpg", "17.jpg", "18.jpg", "30.jpg", "49.jpg"]
    (source / bad[0]).write_bytes(good[0].read_bytes()[:900])
    (source / bad[1]).write_bytes(b"")
    (source / bad[2]).write_text("no image")
    (source / bad[3]).unlink()
    os.mkfifo(source / bad[3])
    Image.new("RGB", (400, 300)).save(source / bad[4])
    words = [f"checkpoint={trained_run}", f"source={source}", f"output={output}", "pictures=false", "max_pixels=99999"]
    signal.alarm(1000)  # a pipe would block for ever
    assert tool("infer", *words) == 3
    signal.alarm(0)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("45 images, ")
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{source}/{name}" for name in bad]
    assert [record["file_name"] for record in images_found(output)] == [f.name for f in good_names(source, bad)]
    assert (output / "failed.txt").read_text().count("\n") == 6
    for name in bad:
        (source / name).unlink()
    assert tool("infer", *words) == 0
    assert sorted(digest(output)) == sorted(OF_ALL)


def good_names(source: Path, bad: list[str]) -> list[Path]:
    return [file for file in sorted(source.iterdir()) if file.name not in bad]


def test_pictures_of_similar_names_stand_side_by_side(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path
) -> None:
    source = tmp_path / "names"
    for name in ("a/x.jpg", "b/x.jpg", "x.jpg", "x.JPG", "x.png", "x.dat", "x.dat.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "a.jpg", source / name)
    assert tool("infer", f"checkpoint={trained_run}", f"source={source}/**/*.*", f"output={tmp_path}/out") == 0
    told = {record["file_name"]: record["picture"] for record in images_found(tmp_path / "out")}
    assert len(told) == 7
    assert sorted(digest(tmp_path / "out")) == sorted([*told.values(), *OF_ALL])
    assert len({picture.casefold() for picture in told.values()}) == 7


def test_a_picture_that_its_format_cannot_hold_is_told(
    tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "long").mkdir()
    Image.new("RGB", (16390, 3)).save(tmp_path / "long" / "a.png")
    (tmp_path / "long" / "a.png").rename(tmp_path / "long" / "a.webp")  # WebP ends at 16383 pixels
    Image.new("RGB", (30, 30)).save(tmp_path / "long" / "b.png")
    words = [f"checkpoint={trained_run}", f"source={tmp_path}/long"]
    assert tool("infer", *words, f"output={tmp_path}/out") == 3
    assert "a.webp: no picture of it as .webp" in capsys.readouterr().err
    assert [record.get("picture") for record in images_found(tmp_path / "out")] == [None, "b.png"]


def test_a_model_that_has_diverged_is_refused(
    tool: Tool, trained_run: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, card = load_detector(trained_run / "best.safetensors", torch.device("cpu"))
    with torch.no_grad():
        model.head.box.predict.weight.fill_(3e38)  # finite by itself
    save_detector(tmp_path / "huge.safetensors", model.state_dict(), card)
    words = [f"checkpoint={tmp_path}/huge.safetensors", f"source={photos}", f"output={tmp_path}/out"]
    assert tool("infer", *words) == 2
    assert "predicted boxes have a score or side that is not a finite number - the model has" in one_line(capsys)


class Runs:
    """Inferences over 24 images and a broken one, two at a time, in processes of their own that can be killed.

    They are forks of this process, which has torch loaded already; one by one they would need seconds to start."""

    def __init__(self, main: Callable[[list[str]], None], run: Path, source: Path, folder: Path) -> None:
        self.main, self.folder = main, folder
        # of so few pixels, four images are under way together
        self.words = [f"checkpoint={run}", f"source={source}", "batch_size=2", "device=cpu", "max_pixels=50000"]

    def start(
        self,
        output: Path,
        *words: str,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> Any:
        def task() -> None:
            os.environ.update(environment or {})
            prepare()
            self.main([*self.words, f"output={output}", *words])

        process = get_context("fork").Process(target=task, daemon=True)
        process.start()
        return process

    def finish(self, output: Path, *words: str) -> dict[str, str]:
        """What lies in the output in the end."""
        process = self.start(output, *words)
        process.join(1000)
        assert process.exitcode == 3
        return digest(output)

    def kill(self, output: Path, when: Callable[[], bool]) -> bool:
        """SIGKILL right before the first call to the file system, on a path in the output, at which `when()` is true.
        False when it never was."""
        looking = threading.local()  # what `when` reads itself are such calls, too

        def act(_: int, __: str, arguments: tuple[object, ...]) -> None:
            if str(arguments[0]).startswith(str(output)) and not getattr(looking, "now", False):
                looking.now = True
                if when():
                    os.kill(os.getpid(), signal.SIGKILL)
                looking.now = False

        process = self.start(output, prepare=lambda: before_each_file_call(act))
        process.join(1000)
        return process.exitcode == -signal.SIGKILL


@pytest.fixture
def runs(load: Callable[[str], ModuleType], trained_run: Path, tiny_data: Path, tmp_path: Path) -> Runs:
    good, source = sorted((tiny_data / "val").iterdir()), tmp_path / "photos"
    for number in range(24):
        file = source / f"{number % 3}" / f"{number:02}.{'jpg' if number % 4 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good[number % 5], file)
    (source / "1" / "broken.jpg").write_bytes(b"")
    return Runs(load("infer").main, trained_run, source, tmp_path)


def test_what_is_under_way_together_comes_out_as_one_after_the_other(
    runs: Runs, trained_run: Path, tmp_path: Path
) -> None:
    """Bit for bit and in order, also where no two images have room in memory together."""
    detector, source = retina.load(trained_run, device="cpu"), tmp_path / "photos"
    files = [file for file in sorted(source.rglob("*.*")) if file.stem != "broken"]
    runs.finish(tmp_path / "out", "score_threshold=0.3")
    seen = images_found(tmp_path / "out")
    assert [record["file_name"] for record in seen] == [file.relative_to(source).as_posix() for file in files]
    pairs = list_of_pairs(sorted(source.rglob("*.*")))
    expected = [found for pair in pairs for found in detector.predict(pair, score_threshold=0.3)]
    assert [record["boxes"] for record in seen] == [found.boxes.tolist() for found in expected]
    assert [record["scores"] for record in seen] == [found.scores.tolist() for found in expected]

    runs.finish(tmp_path / "alone", "score_threshold=0.3", "max_pixels=9000")
    alone = [found for file in files for found in detector.predict(file, score_threshold=0.3)]
    assert [record["boxes"] for record in images_found(tmp_path / "alone")] == [found.boxes.tolist() for found in alone]
    pictures = digest(tmp_path / "alone").keys()
    assert pictures == digest(tmp_path / "out").keys()


def list_of_pairs(files: list[Path]) -> list[list[Path]]:
    """Two at a time, as batches are cut; the broken one is left out of its pair."""
    pairs = [files[first : first + 2] for first in range(0, len(files), 2)]
    return [[file for file in pair if file.stem != "broken"] for pair in pairs]


def noted(output: Path) -> dict[str, Done]:
    """Done batches of an interrupted inference, by key."""
    return read_done(output, 5) if (output / ".infer").is_dir() else {}


def done_pictures(output: Path) -> list[str]:
    return [record["picture"] for batch in noted(output).values() for record in batch.records]


def stamps(output: Path, pictures: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Which file, written when, each picture is."""
    states = {picture: (output / picture).stat() for picture in pictures}
    return {picture: (state.st_ino, state.st_mtime_ns) for picture, state in states.items()}


def moments(output: Path, kills: int, randomness: random.Random) -> Iterator[Callable[[], bool]]:
    """When to kill: first when a batch is done, then at any of the calls with which two or three images are."""
    yield lambda: len(noted(output)) > 0
    for _ in range(kills - 1):
        calls = iter(range(randomness.randrange(24)))
        yield lambda calls=calls: next(calls, None) is None  # type: ignore[misc]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_started_again_it_ends_with_the_same_bytes(
    runs: Runs, tmp_path: Path, kills: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("tried", kills)
    expected = runs.finish(tmp_path / "clean")
    assert len(expected) == 24 + len(OF_ALL) + 1
    output, done, killed = tmp_path / "killed", {}, 0
    for moment in moments(output, kills, random.Random(kills)):
        killed += runs.kill(output, moment)
        assert stamps(output, done) == done, "done images are not done again"
        there = {name: code for name, code in digest(output).items() if not name.startswith(".infer/")}
        assert there.items() <= expected.items(), "a picture is there whole or not at all"
        done = stamps(output, done_pictures(output))
    assert killed == kills
    assert 0 < len(done) < 24
    assert runs.finish(output) == expected
    assert done == {
        picture: (state.st_ino, state.st_mtime_ns) for picture in done for state in [(output / picture).stat()]
    }
    assert not (output / ".infer").exists()


def test_what_was_done_under_other_settings_is_done_again(runs: Runs, tmp_path: Path) -> None:
    clean, output = tmp_path / "clean", tmp_path / "killed"
    expected = runs.finish(clean, "score_threshold=0.95")
    assert runs.kill(output, lambda: len(noted(output)) > 2)
    records = [record for batch in noted(output).values() for record in batch.records]
    assert min(score for record in records for score in record["scores"]) < 0.95
    assert runs.finish(output, "score_threshold=0.95") == expected


def test_two_processes_killed_and_one_that_goes_on(runs: Runs, tmp_path: Path) -> None:
    expected = runs.finish(tmp_path / "clean")
    output = tmp_path / "killed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [runs.start(output, environment=group | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    journals = [output / ".infer" / f"{rank}.jsonl" for rank in range(2)]
    while all(process.is_alive() for process in processes) and not all(
        journal.is_file() and b"key" in journal.read_bytes() for journal in journals
    ):
        time.sleep(0.001)
    for process in processes:
        process.kill()
    assert [(process.join(), process.exitcode) for process in processes] == [(None, -signal.SIGKILL)] * 2
    done = stamps(output, done_pictures(output))
    assert len(done) >= 4
    assert runs.finish(output) == expected
    assert done == {
        picture: (state.st_ino, state.st_mtime_ns) for picture in done for state in [(output / picture).stat()]
    }


def test_tables_labels_and_crops_say_what_was_detected(
    tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output, source = tmp_path / "out", tmp_path / "photos"
    shutil.copytree(tiny_data / "val", source)
    found = retina.load(trained_run, device="cpu").predict(sorted(source.iterdir()))
    lowest, second, *_ = sorted(float(one.scores[0]) for one in found)
    limit = (lowest + second) / 2  # so that there is an image without detections
    words = [f"checkpoint={trained_run}", f"source={source}", f"output={output}", "device=cpu", "pictures=false"]
    words += [f"score_threshold={limit}", "crops=true", "prelabels=[yolo,coco]"]
    assert tool("infer", *words) == 0
    images, classes = images_found(output), retina.load(trained_run).classes
    total = sum(len(one["scores"]) for one in images)
    assert [len(one["scores"]) for one in images].count(0) == 1

    head, *counts = csv.reader((output / "counts.csv").read_text().splitlines())
    assert head == ["image", *classes, "total"]
    for image, (name, *numbers) in zip(images, counts, strict=True):
        assert name == image["file_name"]
        assert [*map(int, numbers)] == [*(image["classes"].count(one) for one in classes), len(image["scores"])]
    rows = list(csv.DictReader((output / "detections.csv").read_text().splitlines()))
    told = [(row["image"], row["class"], float(row["score"]), float(row["x2"])) for row in rows]
    assert told == [
        (image["file_name"], name, score, box[2])
        for image in images
        for name, score, box in zip(image["classes"], image["scores"], image["boxes"], strict=True)
    ]

    labelled = retina.read_coco(output / "coco.json", source)  # as a data set: its labels are what was detected
    assert [labelled.file_name(k) for k in range(len(labelled))] == [image["file_name"] for image in images]
    np.testing.assert_allclose(labelled.boxes, [box for image in images for box in image["boxes"]])
    assert [labelled.classes[k] for k in labelled.labels] == [name for image in images for name in image["classes"]]

    assert (output / "classes.txt").read_text().splitlines() == [*classes]
    for image in images:
        lines = (output / "labels" / image["file_name"]).with_suffix(".txt").read_text().splitlines()
        for line, name, (x1, _, x2, y2) in zip(lines, image["classes"], image["boxes"], strict=True):
            label, x, y, width, height = map(float, line.split())
            assert classes[int(label)] == name
            assert (x + width / 2) * image["width"] == pytest.approx(x2, abs=0.01)
            assert (y + height / 2) * image["height"] == pytest.approx(y2, abs=0.01)
            assert width * image["width"] == pytest.approx(x2 - x1, abs=0.01)
        for crop, (x1, y1, x2, y2) in zip(image["crops"], image["boxes"], strict=True):
            height, width = read_image(output / crop).shape[:2]
            assert abs(width - (x2 - x1)) < 2, crop
            assert abs(height - (y2 - y1)) < 2, crop

    before = digest(output)
    (output / "labels" / f"{Path(images[0]['file_name']).stem}.txt").write_text("0 0.5 0.5 0.1 0.1\n")  # corrected
    capsys.readouterr()
    higher = f"score_threshold={(limit + 1) / 2}"
    assert tool("infer", *words, higher) == 2
    refused_by_tool(capsys, "output-taken", "labels/")
    (output / "labels" / f"{Path(images[0]['file_name']).stem}.txt").unlink()
    assert tool("infer", *words, higher) == 0
    fewer = images_found(output)
    assert sum(len(one["scores"]) for one in fewer) < total
    there = {name for name in digest(output) if name.startswith("crops/")}
    assert there == {crop for one in fewer for crop in one["crops"]}, "none is left of the other inference"
    assert tool("infer", *words) == 0
    assert digest(output) == before


def test_results_of_an_inference_are_scored_against_corrected_labels(
    tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    words = [f"checkpoint={trained_run}", f"source={tiny_data / 'val'}", f"output={tmp_path / 'out'}", "device=cpu"]
    assert tool("infer", *words, "pictures=false", "prelabels=[coco]", "score_threshold=0.5") == 0
    words = [f"detections={tmp_path / 'out' / 'detections.json'}", f"output={tmp_path / 'scored'}", "report=false"]
    assert tool("eval", *words, "data=coco", f"data.val.annotations={tmp_path / 'out' / 'coco.json'}") == 0
    assert json.loads((tmp_path / "scored" / "metrics.json").read_text())["AP"] == 1.0


def test_settings_of_detection_are_those_of_the_library(
    tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    files, detector = sorted((tiny_data / "val").iterdir()), retina.load(trained_run, device="cpu")
    usual = detector.predict(files, score_threshold=0.3)
    first = next(iter(usual[0]))["class"]
    for number, settings in enumerate(
        [{"short_side": 32}, {"nms_iou": 0.05}, {"class_agnostic": True}, {"classes": [first]}]
    ):
        output = tmp_path / f"out{number}"
        words = [f"checkpoint={trained_run}", f"source={tiny_data / 'val'}", f"output={output}", "device=cpu"]
        typed = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        assert tool("infer", *words, "pictures=false", *typed) == 0
        expected = detector.adjusted(**settings).predict(files, score_threshold=0.3)
        images = images_found(output)
        assert [one.records() for one in expected] != [one.records() for one in usual]
        for image, found in zip(images, expected, strict=True):
            np.testing.assert_allclose(image["boxes"], found.boxes.reshape(-1, 4), atol=1e-3)
    assert {name for one in images for name in one["classes"]} == {first}


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["short_side=0"], "out-of-range", "short_side"),
        (["short_side=99999"], "out-of-range", "long_side"),
        (["nms_iou=1.5"], "out-of-range", "nms_iou"),
        (["classes=[unicorn]"], "unknown-value", "classes"),
        (["classes=[]"], "out-of-range", "classes"),
        (["label=long"], "unknown-value", "label"),
        (["font=/nowhere.ttf"], "no-file", "font"),
        (["line_width=0"], "out-of-range", "line_width"),
        (["prelabels=[voc]"], "unknown-value", "prelabels"),
        (["prelabels=[yolo]"], "same-name", "source"),
        (["crops=true"], "reserved-name", "source"),
    ],
)
def test_settings_that_cannot_be(
    words: list[str],
    code: str,
    named: str,
    tool: Tool,
    trained_run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    output = photos.parent / "out"
    (photos / "crops").mkdir()
    shutil.copy(photos / "a.jpg", photos / "crops" / "a.jpg")
    shutil.copy(photos / "sub" / "b.png", photos / "a.png")
    assert tool("infer", f"checkpoint={trained_run}", f"source={photos}", f"output={output}", *words) == 2
    refused_by_tool(capsys, code, named)
    assert not output.exists()
