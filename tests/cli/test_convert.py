"""Conversion end to end: rebuilt boxes are equal, sources stay as they are, faults end in one line each and code 2."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

from retina.data.coco import Annotations, read_coco
from retina.data.layouts import locate_split

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"


Tool = Callable[..., int]


def a_coco_set(root: Path) -> Path:
    """A small COCO data set with fractional boxes, negatives, sub-folders, equal base names and an odd class name."""
    generator = np.random.default_rng(0)
    for split, num_images in (("train", 6), ("val", 3)):
        images, annotations = [], []
        for i in range(num_images):
            width, height = (int(side) for side in generator.integers(30, 90, 2))
            name = f"sub{i % 2}/{i // 2}.jpg"
            file = root / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (i, 50, 9)).save(file)
            images.append({"id": 10 * i + 3, "file_name": name, "width": width, "height": height})
            for _ in range(i % 4):
                low, high = np.sort(generator.uniform(0, 1, (2, 2)), axis=0) * (width, height)
                box = [*np.round(low, 2).tolist(), *np.round(high - low + 0.5, 2).tolist()]
                box[2:] = [min(box[2], width - box[0]), min(box[3], height - box[1])]
                category = int(generator.integers(2)) + 1
                annotation = {"id": len(annotations) + 1, "image_id": 10 * i + 3, "category_id": category}
                annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": 1, "name": "big & <red>"}, {"id": 2, "name": "small"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(document))
    return root


def read(root: Path, split: str) -> Annotations:
    return read_coco(*locate_split(root, split))


def objects(annotations: Annotations, i: int) -> slice:
    return slice(annotations.offsets[i], annotations.offsets[i + 1])


def write_voc(coco: Path, root: Path) -> Path:
    """Write a COCO data set as Pascal VOC; val images get `v` before their names."""
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split in ("train", "val"):
        data = read(coco, split)
        names = []
        for i in range(len(data)):
            name = Path(split) / Path(data.file_name(i)).with_suffix("")
            names.append(name.as_posix())
            nodes = [f"<size><width>{data.sizes[i, 1]}</width><height>{data.sizes[i, 0]}</height></size>"]
            for box, label in zip(data.boxes[objects(data, i)], data.labels[objects(data, i)], strict=True):
                edges = zip(("xmin", "ymin", "xmax", "ymax"), box.tolist(), strict=True)
                bndbox = "".join(f"<{tag}>{edge!r}</{tag}>" for tag, edge in edges)
                nodes.append(f"<object><name>{escape(data.classes[label])}</name><bndbox>{bndbox}</bndbox></object>")
            xml = root / "Annotations" / f"{name}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(f"<annotation>{''.join(nodes)}</annotation>")
            put(data.path(i), root / "JPEGImages" / f"{name}{data.path(i).suffix}")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


def write_yolo(coco: Path, root: Path) -> Path:
    """Write a COCO data set as YOLO text with full precision; a negative image gets no label file."""
    for split in ("train", "val"):
        data = read(coco, split)
        for i in range(len(data)):
            height, width = data.sizes[i].tolist()
            lines = []
            for box, label in zip(data.boxes[objects(data, i)].tolist(), data.labels[objects(data, i)], strict=True):
                x1, y1, x2, y2 = box
                fractions = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
                lines.append(f"{label} {' '.join(map(repr, fractions))}\n")
            put(data.path(i), root / "images" / split / data.file_name(i))
            labels = (root / "labels" / split / data.file_name(i)).with_suffix(".txt")
            labels.parent.mkdir(parents=True, exist_ok=True)
            if lines:
                labels.write_text("".join(lines))
    (root / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(read(coco, 'train').classes)}\n"
    )
    return root


def put(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(image.read_bytes())


def digest(root: Path) -> dict[str, str]:
    """Content of every file below root, by path."""
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def assert_same(before: Path, after: Path, *, tolerance: float, prefix: bool = False) -> None:
    """Equal images, sizes, classes, boxes and order of objects."""
    for split in ("train", "val"):
        old, new = read(before, split), read(after, split)
        assert new.classes == old.classes
        rows = {new.file_name(i): i for i in range(len(new))}
        assert len(rows) == len(old)
        for i in range(len(old)):
            j = rows[f"{split}/{old.file_name(i)}" if prefix else old.file_name(i)]
            assert new.path(j).read_bytes() == old.path(i).read_bytes()
            assert new.sizes[j].tolist() == old.sizes[i].tolist()
            assert new.labels[objects(new, j)].tolist() == old.labels[objects(old, i)].tolist()
            np.testing.assert_allclose(new.boxes[objects(new, j)], old.boxes[objects(old, i)], rtol=0, atol=tolerance)
            np.testing.assert_allclose(new.areas[objects(new, j)], old.areas[objects(old, i)], rtol=1e-3, atol=1e-3)
            assert not new.crowd[objects(new, j)].any()


def test_voc_round_trip(tool: Tool, tmp_path: Path) -> None:
    coco = a_coco_set(tmp_path / "coco")
    voc = write_voc(coco, tmp_path / "voc")
    before = digest(voc)
    assert tool("convert", "format=voc", f"source={voc}", f"output={tmp_path / 'out'}") == 0
    assert_same(coco, tmp_path / "out", tolerance=1e-12, prefix=True)
    assert digest(voc) == before


def test_yolo_round_trip(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = a_coco_set(tmp_path / "coco")
    yolo = write_yolo(coco, tmp_path / "yolo")
    before = digest(yolo)
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={tmp_path / 'new' / 'out'}") == 0
    assert_same(coco, tmp_path / "new" / "out", tolerance=1e-3)
    assert digest(yolo) == before
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]
    out, err = capsys.readouterr()
    assert "3 of 9 images have no label file" in err
    assert "train: 6 images, 7 objects\n" in out


def test_blood_cells_round_trip(tool: Tool, tmp_path: Path, bccd: Path) -> None:
    voc = write_voc(bccd, tmp_path / "voc")
    arguments = ["format=voc", f"source={voc}", f"output={tmp_path / 'out'}", "classes=RBC,WBC,Platelets"]
    assert tool("convert", *arguments) == 0
    assert_same(bccd, tmp_path / "out", tolerance=0, prefix=True)


def test_a_test_split_is_written_too(tool: Tool, tmp_path: Path) -> None:
    yolo = write_yolo(a_coco_set(tmp_path / "coco"), tmp_path / "yolo")
    with (yolo / "data.yaml").open("a") as file:
        file.write("test: images/val\n")
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={tmp_path / 'out'}") == 0
    assert len(read(tmp_path / "out", "test")) == 3


def test_images_are_linked_or_copied(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yolo = write_yolo(a_coco_set(tmp_path / "coco"), tmp_path / "yolo")
    source = yolo / "images" / "train" / "sub0" / "1.jpg"

    def converted(output: str, *more: str) -> Path:
        assert tool("convert", "format=yolo", f"source={yolo}", f"output={tmp_path / output}", *more) == 0
        return tmp_path / output / "train" / "sub0" / "1.jpg"

    def refuse(*_: Any) -> None:
        raise OSError("not on this file system")

    assert converted("hard").samefile(source)
    assert not converted("copied", "copy=true").samefile(source)
    monkeypatch.setattr(os, "link", refuse)
    linked = converted("symbolic")
    assert linked.is_symlink()
    assert linked.samefile(source)
    monkeypatch.setattr(os, "symlink", refuse)
    fallback = converted("fallback")
    assert not fallback.samefile(source)
    assert fallback.read_bytes() == source.read_bytes()


def test_equal_names_from_several_folders_stay_apart(tool: Tool, tmp_path: Path) -> None:
    for folder, colour in (("p/images", 10), ("q/images", 200), ("v/images", 90)):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("L", (20, 20), colour).save(tmp_path / "set" / folder / "a.png")
        labels = tmp_path / "set" / folder.replace("images", "labels")
        labels.mkdir()
        (labels / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "set" / "data.yaml").write_text("train: [p/images, q/images]\nval: v/images\nnames: [cell]\n")
    assert tool("convert", "format=yolo", f"source={tmp_path / 'set'}", f"output={tmp_path / 'out'}") == 0
    data = read(tmp_path / "out", "train")
    assert [data.file_name(i) for i in range(2)] == ["a.png", "a_2.png"]
    assert [Image.open(data.path(i)).getpixel((0, 0)) for i in range(2)] == [10, 200]


def a_faulty_set(root: Path, num_faults: int) -> Path:
    yolo = write_yolo(a_coco_set(root / "coco"), root / "yolo")
    with (yolo / "labels" / "val" / "sub1" / "0.txt").open("a") as file:
        file.write("7 0.5 0.5 0.1 0.1\n" * num_faults)
    return yolo


def test_faults_stop_and_nothing_is_written(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo = a_faulty_set(tmp_path, 25)
    output = tmp_path / "out"
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={output}") == 2
    out, err = capsys.readouterr()
    first = f"{yolo / 'labels' / 'val' / 'sub1' / '0.txt'}:2: class 7 is not in 0..1 - "
    lines = out.splitlines()
    assert lines[0].startswith(first)
    assert len(lines) == 21
    assert "(and 5 more like it)" in lines[19]
    assert "on_error=skip" in lines[20]
    assert err.startswith(f"error[records]: {first}")
    assert len(err.splitlines()) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["coco", "yolo"]


def test_faults_can_be_left_out(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo = a_faulty_set(tmp_path, 3)
    output = tmp_path / "out"
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={output}", "on_error=skip") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert [line.startswith("left out: ") for line in lines] == [True] * 3
    assert_same(tmp_path / "coco", output, tolerance=1e-3)


def test_output_is_never_overwritten(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo = write_yolo(a_coco_set(tmp_path / "coco"), tmp_path / "yolo")
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    for target, code in (
        (output, "output-taken"),
        (output / "precious", "output-taken"),
        (yolo / "inside", "output-in-data"),
        (yolo, "output-in-data"),
    ):
        assert tool("convert", "format=yolo", f"source={yolo}", f"output={target}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error[{code}]: output: {target} ")
    assert digest(output) == {"precious": hashlib.sha256(b"mine").hexdigest()}
    (output / "precious").unlink()
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={output}") == 0
    assert_same(tmp_path / "coco", output, tolerance=1e-3)


def test_no_half_written_output(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yolo = write_yolo(a_coco_set(tmp_path / "coco"), tmp_path / "yolo")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retina.cli.convert.json.dumps", full)
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={tmp_path / 'out'}") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["coco", "yolo"]


def test_an_image_in_both_splits_is_told(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yolo = write_yolo(a_coco_set(tmp_path / "coco"), tmp_path / "yolo")
    (yolo / "data.yaml").write_text("train: images/val\nval: images/val\nnames: [a, b]\n")
    assert tool("convert", "format=yolo", f"source={yolo}", f"output={tmp_path / 'out'}") == 0
    assert "warning: 3 images are in train and in val" in capsys.readouterr().err


def test_crowd_and_class_file(tool: Tool, tmp_path: Path) -> None:
    voc = write_voc(a_coco_set(tmp_path / "coco"), tmp_path / "voc")
    xml = voc / "Annotations" / "train" / "sub1" / "0.xml"
    xml.write_text(xml.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    (tmp_path / "names.txt").write_text("small\nbig & <red>\n\n")
    arguments = [f"source={voc}", f"output={tmp_path / 'out'}", f"classes={tmp_path / 'names.txt'}", "difficult=crowd"]
    assert tool("convert", "format=voc", *arguments) == 0
    data = read(tmp_path / "out", "train")
    assert data.classes == ("small", "big & <red>")
    assert np.count_nonzero(data.crowd) == 1


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["sorce=x"], "unknown-key", "did you mean source?"),
        (["format=coco"], "unknown-value", "format: "),
        (["format"], "unreadable-override", "format: "),
        (["output=null"], "missing-setting", "source: missing"),
        (["seed=x"], "", "seed: "),
        (["val_fraction=1"], "out-of-range", "val_fraction: "),
        (["val_fraction=nan"], "out-of-range", "val_fraction: "),
        (["on_error=go"], "unknown-value", "on_error: "),
        (["difficult=no"], "unknown-value", "difficult: "),
        (["copy=maybe"], "", "copy: "),
        (["classes=a,b,a"], "class-names", "'a' is there twice"),
        (["one_based=true"], "contradiction", "one_based: "),
    ],
)
def test_wrong_options_are_one_line(
    tool: Tool, words: list[str], code: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["format=yolo", f"source={tmp_path / 'x'}", f"output={tmp_path / 'y'}"]
    common = [] if code == "missing-setting" else places
    assert tool("convert", *common, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error[{code}]: " if code else "error"), err
    assert named in err


def test_command_line(tmp_path: Path) -> None:
    """Exit codes of the real command, without a traceback."""
    yolo = a_faulty_set(tmp_path, 1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stdout + done.stderr
        return done

    usage = run("--help")
    assert usage.returncode == 0
    assert "format=yolo source=" in usage.stdout
    bare = run()
    assert (bare.returncode, bare.stdout) == (2, "")
    stopped = run("format=yolo", f"source={yolo.name}", "output=out")
    assert stopped.returncode == 2
    assert stopped.stderr.startswith("error[records]: yolo/labels/val/sub1/0.txt:2: ")
    done = run("format=yolo", f"source={yolo.name}", "output=out", "on_error=skip")
    assert done.returncode == 0
    assert_same(tmp_path / "coco", tmp_path / "out", tolerance=1e-3)
