"""From settings to checked annotations: what stops, what is left out, what is told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faults import refused
from ranks import in_processes
from retina.cli.data import DataConfig, SplitConfig, check_data, load_checked, load_split, named_splits
from retina.data import cache as annotation_cache
from retina.data.checks import DataReport, RecordsError
from retina.data.dataset import CocoDetection
from retina.data.pixels import AS_STORED
from retina.data.transforms import eval_pipeline
from retina.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images to train on, each with a box, and two to evaluate on."""
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("train", range(1, 11)), ("val", range(21, 23))):
        (tmp_path / split).mkdir()
        for i in numbers:
            Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / split / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in numbers],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [5, 5, 9, 9]} for i in numbers],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def edit(root: Path, **changes: Any) -> None:
    """`images__3={...}`: changes of one record of the training file."""
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for where, change in changes.items():
        section, _, row = where.partition("__")
        content[section][int(row)].update(change)
    file.write_text(json.dumps(content))


def config_of(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(name="x", root=str(root), **settings)


def test_a_sound_split_is_told_of(root: Path) -> None:
    report = DataReport()
    annotations = load_split(config_of(root), "train", report=report)
    assert len(annotations) == 10
    assert report.splits["train"] == {
        "annotations": str(root / "annotations" / "instances_train.json"),
        "images": str(root / "train"),
        "num_images": 10,
        "num_images_without_objects": 0,
        "num_objects": 10,
        "num_crowd_regions": 0,
        "objects_per_class": {"cat": 10},
    }
    val = load_split(config_of(root), "val", classes=annotations.classes, report=report)
    check_data(config_of(root), {"train": annotations, "val": val}, report)
    assert (report.faults, report.warnings) == ([], [])


def test_faulty_records_stop_or_are_left_out(root: Path) -> None:
    edit(root, annotations__0={"bbox": None}, images__3={"width": "40"}, annotations__5={"bbox": [90, 90, 5, 5]})
    report = DataReport()
    with pytest.raises(RecordsError) as caught:
        load_split(config_of(root), "train", report=report)
    assert len(caught.value.faults) == 3
    assert report.faults == caught.value.faults
    report = DataReport()
    annotations = load_split(config_of(root, on_error="skip"), "train", report=report)
    assert report.faults == caught.value.faults
    assert annotations.image_ids.tolist() == [2, 3, 5, 7, 8, 9, 10], "1 and 6 show objects, 4 is at fault itself"
    assert (annotations.offsets[1:] - annotations.offsets[:-1]).tolist() == [1] * 7


def test_structural_faults_stop_all_the_same(root: Path) -> None:
    (root / "annotations" / "instances_train.json").write_text("[]")
    report = DataReport()
    with pytest.raises(DataError) as caught:
        load_split(config_of(root, on_error="skip"), "train", report=report)
    assert caught.value.code == "not-coco"
    assert report.faults == [str(caught.value)]


def test_unusable_images_are_tolerated_up_to_a_share(root: Path) -> None:
    (root / "train" / "2.png").write_bytes(b"")
    (root / "train" / "4.png").unlink()
    annotations = load_split(config_of(root), "train")
    for share, stops in [(0.2, False), (0.199, True), (0.1, True), (0.0, True), (1.0, False)]:
        report = DataReport()
        config = config_of(root, max_bad_fraction=share)
        if stops:
            with refused("records", "2 of 10", "max_bad_fraction"):
                check_data(config, {"train": annotations}, report)
        else:
            check_data(config, {"train": annotations}, report)
        assert [line.split(": ")[0].rpartition("/")[2] for line in report.faults] == ["2.png", "instances_train.json"]


def test_one_unusable_image_speaks_for_itself(root: Path) -> None:
    (root / "train" / "2.png").write_bytes(b"")
    annotations = load_split(config_of(root), "train")
    with refused("records", f"{root}/train/2.png: ", kind=RecordsError):
        check_data(config_of(root), {"train": annotations}, DataReport())


def test_an_image_above_the_limit_is_unusable(root: Path) -> None:
    annotations = load_split(config_of(root), "val")
    report = DataReport()
    with refused("records", "2 of 2"):
        check_data(config_of(root, max_pixels=1199), {"val": annotations}, report)
    assert all("max_pixels=1199" in line for line in report.faults)
    check_data(config_of(root, max_pixels=1200), {"val": annotations}, DataReport())


def test_the_range_of_16_bit_images_is_measured_on_the_first_split_and_told(root: Path, tmp_path: Path) -> None:
    for split, top in (("train", 4000), ("val", 60000)):
        for file in (root / split).iterdir():
            values = np.linspace(1000, top, 1200, dtype=np.uint16).reshape(30, 40)
            Image.fromarray(values).save(file)
    lines: list[str] = []
    loaded = load_checked(config_of(root), ["train", "val"], tmp_path / "run", say=lines.append)
    assert [annotations.pixels.value_range for annotations in loaded] == [(1000, 4000)] * 2
    assert len([line for line in lines if "10 have 16 bits" in line]) == 1
    (val,) = load_checked(config_of(root), ["val"], tmp_path / "run", say=lines.append)
    assert val.pixels == AS_STORED
    (train,) = load_checked(config_of(root, value_range=[0, 5000]), ["train"], tmp_path / "run", say=lines.append)
    assert train.pixels.value_range == (0, 5000)
    assert CocoDetection(train, eval_pipeline(30, 40)).read(0).image.max() == 4000 * 255 // 5000
    for wrong in ([1], [5, 5], [-1, 5], [0, 65536]):
        with refused("out-of-range", "value_range", kind=ConfigError):
            config_of(root, value_range=wrong)


def test_files_are_joined_and_their_shares_chosen(root: Path) -> None:
    files = [str(root / "annotations" / f"instances_{split}.json") for split in ("train", "val")]
    folders = [str(root / split) for split in ("train", "val")]
    places = SplitConfig(annotations=files, images=folders, fraction=[0.5, 1])
    report = DataReport()
    annotations = load_split(DataConfig(name="x", train=places), "train", report=report)
    assert len(annotations) == 5 + 2
    assert report.splits["train"]["num_objects"] == 7
    check_data(DataConfig(name="x", train=places), {"train": annotations}, report)
    assert (report.faults, report.warnings) == ([], [])
    one_folder = SplitConfig(annotations=files, images=str(root))
    assert len(load_split(DataConfig(name="x", train=one_folder), "train")) == 12
    for wrong, key in (({"images": folders[:1] * 3}, "images"), ({"fraction": [0.5] * 3}, "fraction")):
        config = DataConfig(name="x", train=replace(places, **wrong))
        with refused("contradiction", f"data.train.{key}", kind=ConfigError):
            load_split(config, "train")
    with refused("contradiction", "data.train.annotations", kind=ConfigError):
        load_split(DataConfig(name="x", train=places), "train", needs="ids")
    with refused("out-of-range", "fraction", kind=ConfigError):
        SplitConfig(fraction=0.0)


def test_images_that_no_record_names_are_told_where_all_records_are_read(root: Path) -> None:
    (root / "train" / "new.png").touch()

    def left_over_of(**changes: Any) -> list[str]:
        config, report = config_of(root, **changes), DataReport()
        splits = {split: load_split(config, split, report=report) for split in named_splits(config)}
        check_data(config, splits, report)
        return [line for line in report.warnings if "new.png" in line]

    assert len(left_over_of()) == 1
    assert left_over_of(train=SplitConfig(fraction=0.5)) == [], "a part of the set leaves the others"


def test_nothing_annotated_stops(root: Path) -> None:
    file = root / "annotations" / "instances_train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    annotations = load_split(config_of(root), "train")
    for on_error in ("stop", "skip"):
        for split in ("train", "val"):
            with refused("records", file, kind=RecordsError):
                check_data(config_of(root, on_error=on_error), {split: annotations}, DataReport())


def test_images_outside_need_leave(root: Path) -> None:
    edit(root, images__0={"file_name": "../val/21.png"})
    with refused("records", "image 1 (../val/21.png): ", "allow_outside=true"):
        load_split(config_of(root), "train")
    skipped = load_split(config_of(root, on_error="skip"), "train")
    assert 1 not in skipped.image_ids
    allowed = load_split(config_of(root, allow_outside=True), "train")
    check_data(config_of(root, allow_outside=True), {"train": allowed}, DataReport())
    # where no image is read, names do no harm
    config = DataConfig(name="x", train=SplitConfig(annotations=str(root / "annotations" / "instances_train.json")))
    assert len(load_split(config, "train", needs="sizes")) == 10


def test_which_splits_there_are(root: Path) -> None:
    assert named_splits(config_of(root)) == ["train", "val"]
    (root / "annotations" / "instances_val.json").rename(root / "annotations" / "instances_val2017.json")
    assert named_splits(config_of(root)) == ["train", "val"]
    (root / "annotations" / "instances_train.json").unlink()
    assert named_splits(config_of(root)) == ["val"]
    assert named_splits(config_of(root / "nowhere")) == ["train"]
    assert named_splits(DataConfig(name="x", val=SplitConfig(annotations="a.json"))) == ["val"]


def test_where_nothing_is_named(tmp_path: Path) -> None:
    with refused("missing-setting", "data.root: ", kind=ConfigError):
        load_split(DataConfig(name="x"), "train")
    config = DataConfig(name="x", train=SplitConfig(annotations="a.json", images=str(tmp_path / "none")))
    with refused("no-images", tmp_path / "none", kind=DataError):
        load_split(config, "train")


def test_checking_is_light() -> None:
    code = "import sys, retina.cli.data; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_one_process_of_a_machine_parses_for_the_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "CACHE_FROM_BYTES", 0)

    def task(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        loaded = load_checked(config_of(root), ["train", "val"], tmp_path / f"run_{rank}", say=print)
        mapped = [annotations.image_ids.base is not None for annotations in loaded]
        assert mapped == [rank > 0] * 2
        (tmp_path / f"fingerprints_{rank}").write_text(str([annotations.fingerprint() for annotations in loaded]))

    assert in_processes(task, tmp_path) == [0, 0]
    assert (tmp_path / "fingerprints_0").read_text() == (tmp_path / "fingerprints_1").read_text()


def test_a_fault_of_the_first_process_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(name="tiny", root=str(tmp_path / "nowhere"))

    def task(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        load_checked(config, ["train"], tmp_path / "run", say=print)

    assert in_processes(task, tmp_path) == [1, 2]
    assert "Traceback" in capfd.readouterr().err
