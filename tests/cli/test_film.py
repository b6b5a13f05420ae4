"""What is found in a film is what is found in its frames, upright and in time; a kill changes nothing."""

import csv
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import retina
from commands import Capture, Tool, digest, refused_by_tool

av = pytest.importorskip("av")

STAMPS = [0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17]
"""Tenths of a second: the frames of a camera in the dark."""


@pytest.fixture(scope="module")
def film(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("film") / "film.mp4"
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted((tiny_data / "val").iterdir())]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 10)
        for number, stamp in enumerate(STAMPS):
            frame = av.VideoFrame.from_ndarray(images[number % len(images)], format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def frames(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]


def test_frames_are_looked_at_and_drawn(tool: Tool, trained_run: Path, film: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={trained_run}", f"source={film}", "device=cpu", "batch_size=4", "score_threshold=0.3"]
    assert tool("infer", *words, f"output={tmp_path}/out") == 0
    found = records(tmp_path / "out")
    assert [record["frame"] for record in found] == [*range(len(STAMPS))]
    assert [record["seconds"] for record in found] == pytest.approx([stamp / 10 for stamp in STAMPS])
    detector = retina.load(trained_run, device="cpu")
    expected = detector.predict(frames(film), score_threshold=0.3, batch_size=4)
    assert [record["boxes"] for record in found] == [one.boxes.tolist() for one in expected]
    with (tmp_path / "out" / "counts.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for row, record in zip(rows, found, strict=True):
        assert {name: int(row[name]) for name in detector.classes} == {
            name: record["classes"].count(name) for name in detector.classes
        }
    with av.open(str(tmp_path / "out" / "film.mp4")) as drawn:
        times = [frame.time for frame in drawn.decode(video=0)]
    assert times == pytest.approx([stamp / 10 for stamp in STAMPS], abs=0.02)

    assert tool("infer", *words, f"output={tmp_path}/third", "every=3", "pictures=false") == 0
    assert [record["frame"] for record in records(tmp_path / "third")] == [0, 3, 6, 9]
    assert sorted(digest(tmp_path / "third")) == ["counts.csv", "detections.jsonl", "inference.json"]


def test_a_film_that_displays_turn_is_upright(tool: Tool, trained_run: Path, film: Path, tmp_path: Path) -> None:
    """As telephones make them: the matrix in the header turns it a quarter clockwise."""
    data = bytearray(film.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *turn)
    (tmp_path / "turned.mp4").write_bytes(data)
    words = [f"checkpoint={trained_run}", "device=cpu", "batch_size=4", "score_threshold=0.3", "pictures=false"]
    assert tool("infer", *words, f"source={tmp_path}/turned.mp4", f"output={tmp_path}/out") == 0
    upright = [np.rot90(frame, -1) for frame in frames(film)]
    expected = retina.load(trained_run, device="cpu").predict(upright, score_threshold=0.3, batch_size=4)
    assert [record["boxes"] for record in records(tmp_path / "out")] == [one.boxes.tolist() for one in expected]


def test_killed_and_started_again_it_ends_the_same(
    load: Callable[[str], ModuleType], trained_run: Path, film: Path, tmp_path: Path
) -> None:
    words = [f"checkpoint={trained_run}", f"source={film}", "device=cpu", "batch_size=2"]

    def start(output: Path) -> object:
        process = get_context("fork").Process(target=load("infer").main, args=([*words, f"output={output}"],))
        process.start()
        return process

    clean = start(tmp_path / "clean")
    clean.join(1000)
    journal, done = tmp_path / "killed" / ".infer" / "film.jsonl", 0
    for wanted in (2, 6):
        process = start(tmp_path / "killed")
        while process.is_alive() and not (journal.is_file() and journal.read_bytes().count(b"\n") > wanted):
            time.sleep(0.0005)
        process.kill()
        process.join()
        done += process.exitcode == -signal.SIGKILL
    assert done
    process = start(tmp_path / "killed")
    process.join(1000)
    assert process.exitcode == 0
    for name in ("detections.jsonl", "counts.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "clean"))


def test_what_is_no_film_is_one_line(
    tool: Tool, trained_run: Path, film: Path, tmp_path: Path, capsys: Capture
) -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for name, content in (("cut", film.read_bytes()[:600]), ("empty", b""), ("text", b"none"), ("list", playlist)):
        file = tmp_path / f"{name}.mp4"
        file.write_bytes(content)
        words = [f"checkpoint={trained_run}", f"source={file}", f"output={tmp_path}/{name}", "device=cpu"]
        assert tool("infer", *words) == 2
        refused_by_tool(capsys, "bad-film", file)
        assert not (tmp_path / name / "detections.jsonl").exists()
    words = [f"checkpoint={trained_run}", f"source={film}", f"output={tmp_path}/small", "max_pixels=100"]
    assert tool("infer", *words) == 2
    refused_by_tool(capsys, "too-many-pixels", film)
