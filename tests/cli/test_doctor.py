"""The doctor's exit codes, what it prints, where it writes, and that it reads only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from programs import Program

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(tiny_data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def report(file: str = "data_report.json") -> Any:
    return json.loads(Path(file).read_text())


def test_a_healthy_data_set(tool: Tool, data: Path, capsys: Capture) -> None:
    assert tool("doctor", "data=coco", f"data.root={data}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("train: 4 images (")
    assert lines[0].endswith(f" - {data}/annotations/instances_train.json")
    assert lines[1].startswith("val: 5 images (")
    assert lines[3].split() == ["class", "train", "val"]
    found = report()
    counts = [[found["splits"][split]["objects_per_class"][name] for split in ("train", "val")] for name in ("circle",)]
    assert [line.split()[1:] for line in lines if line.startswith("circle")] == [
        [f"{n}" for n in row] for row in counts
    ]
    assert lines[-1].endswith(" - all in data_report.json")
    assert (found["healthy"], found["num_faults"], found["faults"]) == (True, 0, [])
    assert sorted(path.name for path in Path().iterdir()) == ["data", "data_report.json", "data_report_plots.png"]
    with Image.open("data_report_plots.png") as picture:
        picture.load()
        assert picture.width > 1000


def test_a_picture_of_somebody_else_is_not_replaced(tool: Tool, data: Path, capsys: Capture) -> None:
    Image.new("RGB", (8, 8)).save("data_report_plots.png")
    before = Path("data_report_plots.png").read_bytes()
    assert tool("doctor", f"data.root={data}", "decode=false") == 2
    assert capsys.readouterr().err.startswith("error[output-taken]: plots: ")
    assert tool("doctor", f"data.root={data}", "decode=false", "plots=false") == 0
    assert Path("data_report_plots.png").read_bytes() == before
    assert tool("doctor", f"data.root={data}", "decode=false", "output=new.json") == 0
    assert tool("doctor", f"data.root={data}", "decode=false", "output=new.json") == 0, "its own it may replace"
    assert Path("new_plots.png").exists()


def test_faults_of_records_and_of_pixels_come_together(tool: Tool, data: Path, capsys: Capture) -> None:
    image = next((data / "train").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-300])
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = None
    file.write_text(json.dumps(content))
    assert tool("doctor", f"data.root={data}", "output=out/report.json") == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{image}: cannot be decoded") for line in lines)
    assert any(line.startswith(f"{file}: annotation 1 of image 1 ") for line in lines)
    assert lines[-1].startswith("2 faults, ")
    assert len(report("out/report.json")["faults"]) == 2
    assert tool("doctor", f"data.root={data}", "output=out/report.json", "decode=false") == 2, "replaces its own report"
    assert len(report("out/report.json")["faults"]) == 1


def test_one_split_is_enough(tool: Tool, data: Path) -> None:
    file, folder = data / "annotations" / "instances_val.json", data / "val"
    assert tool("doctor", f"data.val.annotations={file}", f"data.val.images={folder}") == 0
    assert list(report()["splits"]) == ["val"]
    (data / "annotations" / "instances_val.json").unlink()
    assert tool("doctor", f"data.root={data}") == 0
    assert list(report()["splits"]) == ["train"]
    (data / "annotations" / "instances_train.json").unlink()
    assert tool("doctor", f"data.root={data}") == 2
    (line,) = report()["faults"]
    assert "expected " in line


def test_a_split_that_cannot_be_read_does_not_hide_the_other(tool: Tool, data: Path) -> None:
    (data / "annotations" / "instances_train.json").write_text("{")
    next((data / "val").glob("*.jpg")).write_bytes(b"")
    assert tool("doctor", f"data.root={data}") == 2
    assert ["is cut off" in line or "is empty" in line for line in report()["faults"]] == [True, True]


def test_the_report_is_not_written_into_the_data_nor_over_other_files(tool: Tool, data: Path, capsys: Capture) -> None:
    Path("notes.json").write_text('{"mine": 1}')
    Path("link.json").symlink_to("notes.json")
    before = sorted(data.rglob("*"))
    for output, words in [
        (data / "report.json", "the data set's own"),
        (data / "new" / "report.json", "the data set's own"),
        (data / "train" / ".." / "report.json", "the data set's own"),
        ("notes.json", "is no report"),
        ("link.json", "is no report"),
        (data.parent, "is no report"),
    ]:
        assert tool("doctor", f"data.root={data}", f"output={output}") == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert words in line
    places = [f"data.val.annotations={data}/annotations/instances_val.json", f"data.val.images={data}/val"]
    assert tool("doctor", *places, f"output={data}/val/report.json") == 2
    assert Path("notes.json").read_text() == '{"mine": 1}'
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "data.root: missing"),
        (["data.root=nowhere"], "nowhere"),
        (["data.rot=x"], "did you mean data.root"),
        (["data.root=x", "decode=maybe"], "decode: 'maybe'"),
        (["data.root=x", "data.on_error=ignore"], "data.on_error: 'ignore'"),
    ],
)
def test_mistakes_are_one_line(tool: Tool, data: Path, capsys: Capture, words: list[str], part: str) -> None:
    assert tool("doctor", *words) == 2
    out, err = capsys.readouterr()
    assert any(part in line for line in (out + err).splitlines())
    assert "Traceback" not in out + err


def test_as_a_program(data: Path) -> None:
    (data / "val" / "000001.jpg").unlink()
    tool = Path(__file__).parents[2] / "tools" / "doctor.py"
    process = Program(tool, "data=coco", f"data.root={data}", cwd=data.parent)
    out, err = process.communicate(timeout=1000)
    assert (process.returncode, err) == (2, "")
    assert "image 2 (000001.jpg): no such image in " in out
