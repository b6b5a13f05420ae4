"""The audit as a user runs it: with a detector, and with trainings that judge each other's images."""

import csv
import json
from pathlib import Path

import pytest

import retina
from commands import Capture, Tool, digest, refused_by_tool
from retina.data.layouts import locate_split


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "suspects.csv").read_text().splitlines()))


def test_a_page_a_table_and_a_file_for_annotation_tools(
    tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    before, output = digest(tiny_data), tmp_path / "out"
    words = [f"data.root={tiny_data}", f"checkpoint={trained_run}", "split=val", f"output={output}", "device=cpu"]
    assert tool("audit", *words, "limit=30") == 0
    assert digest(tiny_data) == before
    assert sorted(digest(output)) == ["audit.html", "suspects.csv", "suspects.json"]
    table = rows(output)
    assert 0 < len(table) <= 30
    assert [int(row["rank"]) for row in table] == [*range(1, len(table) + 1)]
    page = (output / "audit.html").read_text()
    assert page.count("<figure") == len(table)
    assert page.count("data:image/jpeg;base64,") == len(table)
    assert "suspects" in capsys.readouterr().out

    truth = retina.read_coco(*locate_split(tiny_data, "val"))
    back = retina.read_coco(output / "suspects.json", tiny_data / "val")
    content = json.loads((output / "suspects.json").read_text())["annotations"]
    assert back.classes == truth.classes
    assert sum("suspect" not in one for one in content) <= truth.num_objects
    missing = [row for row in table if row["kind"] in ("missing", "unlabelled")]
    assert len([one for one in content if one["id"] > truth.num_objects]) == len(missing)

    assert tool("audit", *words, "limit=5") == 0, "an earlier audit is replaced"
    assert len(rows(output)) <= 5
    (output / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert tool("audit", *words) == 2
    refused_by_tool(capsys, "output-taken", "output")


def test_trainings_judge_the_images_that_they_have_not_seen(
    tool: Tool, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output, short = tmp_path / "out", ["auto=false", "train.length=3", "data.short_side=64", "data.long_side=96"]
    short += ["model.fpn_channels=16", "model.head_convs=1", "model.backbone=resnet18", "data.num_workers=0"]
    short += ["model.levels=[3,4]", "train.batch_size=2", "train.precision=fp32", "trackers=[]", "model.prior=0.2"]
    listed = ",".join(f"'{word}'" for word in short)
    words = [f"data.root={tiny_data}", f"output={output}", "folds=2", f"training=[{listed}]", "device=cpu"]
    assert tool("audit", *words) == 0
    seen = []
    for number in range(2):
        train, judged = (
            json.loads((output / "folds" / f"fold{number}_{name}.json").read_text()) for name in ("train", "val")
        )
        ours, theirs = ({one["file_name"] for one in part["images"]} for part in (train, judged))
        assert not ours & theirs
        records = (output / "folds" / f"fold{number}" / "metrics.jsonl").read_text().splitlines()
        assert sum(json.loads(record)["kind"] == "val" for record in records) == 1, "no weights are chosen"
        assert len(ours | theirs) == 4
        seen += [*theirs]
    assert len(seen) == len({*seen}) == 4
    assert "suspects" in capsys.readouterr().out
    assert tool("audit", *words) == 0, "finished trainings are not repeated"


@pytest.mark.parametrize(
    ("words", "code", "key"),
    [
        (["folds=1"], "out-of-range", "folds"),
        (["folds=99"], "out-of-range", "folds"),
        (["limit=0"], "out-of-range", "limit"),
        (["split=test"], "unknown-value", "split"),
        (["checkpoint=nowhere"], "no-file", "nowhere"),
        (["training=[train.lenght=3]"], "", "lenght"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], code: str, key: str, tool: Tool, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert tool("audit", f"data.root={tiny_data}", f"output={tmp_path / 'out'}", "device=cpu", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error[{code}]" if code else "error"), err
    assert err.count("\n") == 1
    assert key in err
