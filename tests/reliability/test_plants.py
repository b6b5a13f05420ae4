"""Links and pipes that somebody has put where a program writes: what they lead to stays as it is, and nothing hangs.

Each case does what a program does, with the real writers. The program may refuse, in one line, or go on."""

import hashlib
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from commands import Capture, Tool, one_line
from faults import refused
from retina.cli.environment import record_environment
from retina.cli.journal import Done, finish, note, open_journal, open_output, put, read_done
from retina.cli.run_folder import MARK, open_evaluation, open_run
from retina.data.checks import DataReport
from retina.data.coco import read_coco
from retina.data.columns import Columns, write_columns
from retina.data.layouts import locate_split
from retina.data.results import write_results
from retina.data.shapes import write_shapes
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.logging import RunLogger
from retina.errors import RetinaError
from retina.evaluation.metrics import DetectionArrays, write_metrics
from retina.evaluation.pictures import write_evaluation_pictures
from retina.files import Appender, remove, write_whole
from retina.lab.ablate import refuse_to_overwrite
from retina.lab.distribution import open_output as open_distribution
from retina.lab.figures import check_folder, check_format, save
from retina.model.weights import DetectorCard, save_detector
from retina.tracking.trackers import TensorBoard, _kept_id
from tiny import write_tiny_run

Plant = Callable[[], None]
Act = Callable[[Path, Plant], None]

KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a link to a file": lambda path, victims: path.symlink_to(victims / "photo.jpg"),
    "a link to a folder": lambda path, victims: path.symlink_to(victims / "album"),
    "a dangling link": lambda path, victims: path.symlink_to(victims / "nothing"),
    "a pipe": lambda path, victims: os.mkfifo(path),
    "a second name": lambda path, victims: os.link(victims / "photo.jpg", path),
}


def session(folder: Path, plant: Plant, *, late: bool = False) -> None:
    """A run from its start to its end, with all that it writes; or with a stranger at work after its first step."""
    if not late:
        plant()
    open_run(folder, {"name": "x"}, overwrite=False)
    record_environment(folder, {"python": "3"})
    DataReport(faults=["a fault"]).write(folder / "data_report.json")
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    config = TrainConfig(keep_checkpoints=1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    logger = RunLogger(folder, trackers=[TensorBoard()])
    checkpointer = Checkpointer(folder, state, recorder=logger)
    try:
        logger.resume(0)
        for step in (1, 2):
            state.progress.step = step
            logger.info(f"step {step}")
            logger.scalars(step, "train", {"loss": 1.0})
            logger.picture(step, "val/detections", np.zeros((4, 4, 3), np.uint8))
            checkpointer.save()
            checkpointer.save_best({})
            if late and step == 1:
                plant()
        logger.curves()
        _kept_id(folder / "trackers" / "wandb_id", 1, lambda: "id")
    finally:
        logger.close()


def late_session(folder: Path, plant: Plant) -> None:
    session(folder, plant, late=True)


def evaluation(folder: Path, plant: Plant) -> None:
    """Twice, because the second one finds the files of the first."""
    write_shapes(folder.parent / "data", num_train=1, num_val=1, image_size=[64, 64])
    annotations = read_coco(*locate_split(folder.parent / "data", "val"))
    none = np.zeros(0, np.int64)
    detections, output = DetectionArrays(none, np.zeros((0, 4)), np.zeros(0), none), folder / "eval"
    for act in (lambda: None, plant):
        act()
        open_evaluation(output, within=folder)
        DataReport(faults=["a fault"]).write(output / "data_report.json")
        write_metrics(output / "metrics.json", {"per_class": {}})
        write_results(output / "detections.json", annotations, *detections)
        limits = {"max_images": 1, "score_threshold": 0.3}
        assert write_evaluation_pictures(output / "pictures", annotations, detections, **limits) == 1  # type: ignore[arg-type]


def inference(folder: Path, plant: Plant) -> None:
    plant()
    with open_output(folder, ["sub/a.jpg", "labels/a.txt"]):
        read_done(folder, 1)
        with open_journal(folder, 0) as journal:
            put(folder, "sub/a.jpg", b"picture")
            note(journal, Done("key", [], []))
        finish(folder, [("detections.json", b"[]"), ("labels/a.txt", b"")], {}, ["b.jpg: broken"])


def continued_inference(folder: Path, plant: Plant) -> None:
    with open_output(folder, ["sub/a.jpg"]), open_journal(folder, 0) as journal:
        put(folder, "sub/a.jpg", b"picture")
        note(journal, Done("another", [], []))
    inference(folder, plant)


def figure(folder: Path, plant: Plant) -> None:
    plant()
    check_folder(folder, "output")
    check_format(folder / "curves.png", "output")
    save(Figure(), folder / "curves.png")


def late_figure(folder: Path, plant: Plant) -> None:
    open_distribution(folder)
    plant()
    save(Figure(), folder / "curves.png")


def table(folder: Path, plant: Plant) -> None:
    plant()
    refuse_to_overwrite(folder / "gamma.md", "# gamma: ")
    write_whole(folder / "gamma.md", b"# gamma: ")


def shapes(folder: Path, plant: Plant) -> None:
    plant()
    write_shapes(folder / "data", num_train=1, num_val=1, image_size=[64, 64])


def cache(folder: Path, plant: Plant) -> None:
    plant()
    write_columns(folder / "entry", Columns({"ids": np.arange(3)}, {}))


def converted(folder: Path, plant: Plant) -> None:
    for split in ("train", "val"):
        image = folder.parent / "yolo" / "images" / split / f"{split}.png"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image)
    (folder.parent / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x]\n")
    plant()
    words = ["format=yolo", f"source={folder.parent / 'yolo'}", f"output={folder / 'data'}", "copy=true"]
    ended(lambda: importlib.import_module("retina.cli.convert").main(words))


def doctor(folder: Path, plant: Plant) -> None:
    write_shapes(folder.parent / "data", num_train=1, num_val=1, image_size=[64, 64])
    plant()
    words = [f"data.root={folder.parent / 'data'}", f"output={folder / 'report.json'}", "decode=false"]
    ended(lambda: importlib.import_module("retina.cli.doctor").main(words))


def exported(folder: Path, plant: Plant) -> None:
    """The last step of tools/import_weights.py with overwrite=true."""
    plant()
    card = DetectorCard(model={}, classes=["a"], category_ids=[1], preprocessing={}, postprocess={})
    save_detector(folder / "best.safetensors", nn.Linear(2, 2).state_dict(), card)


def swept(folder: Path, plant: Plant) -> None:
    """No job is started, because all are checked before."""
    plant()
    words = [
        "-m",
        "data=coco",
        f"data.root={folder}/none",
        f"runs={folder}",
        "name=x",
        "train.seed=1,2",
        "train.batch_size=0",
    ]
    ended(lambda: importlib.import_module("retina.cli.train").main(words))


def ended(program: Callable[[], object]) -> None:
    with pytest.raises(SystemExit) as end:
        program()
    assert end.value.code in (0, 2)


NAMES: dict[Act, tuple[str, ...]] = {
    session: (
        *("config.yaml", ".config.yaml.tmp", ".lock", "log.txt", "metrics.jsonl", "environment.json", "curves.png"),
        *("data_report.json", "best.safetensors", ".best.safetensors.tmp", "checkpoints", "tensorboard", "trackers"),
        *("trackers/wandb_id", "checkpoints/step_00000001", "checkpoints/.step_00000001.tmp", ".replaced"),
    ),
    late_session: (
        *("best.safetensors", ".best.safetensors.tmp", ".curves.png.tmp", "trackers", "tensorboard", "log.txt"),
        *("checkpoints/step_00000001", "checkpoints/step_00000002", "checkpoints/.step_00000002.tmp", "metrics.jsonl"),
        *("checkpoints/.step_00000001.old", "checkpoints/.step_00000002.aside"),
    ),
    evaluation: (
        *("eval", "eval/metrics.json", "eval/.metrics.json.tmp", "eval/detections.json", "eval/.detections.json.tmp"),
        *("eval/data_report.json", "eval/.data_report.json.tmp", "eval/pictures", "eval/pictures/1_000000.jpg"),
        "eval/pictures/.1_000000.jpg.tmp",
    ),
    inference: (
        *(".infer", "sub", "sub/a.jpg", "labels", "labels/a.txt"),
        *("detections.json", "inference.json", "failed.txt"),
    ),
    continued_inference: (
        *(".infer", ".infer/lock", ".infer/0.jsonl", ".infer/1.jsonl", ".infer/claims.json", "sub", "sub/a.jpg"),
        *("detections.json", "inference.json", "failed.txt"),
        *(f".infer/{hashlib.sha256(name).hexdigest()}.tmp" for name in (b"sub/a.jpg", b"detections.json")),
    ),
    figure: ("curves.png", ".curves.png.tmp"),
    late_figure: ("curves.png", ".curves.png.tmp"),
    table: ("gamma.md", ".gamma.md.tmp"),
    shapes: ("data", "data/shapes.json"),
    cache: ("entry",),
    converted: ("data",),
    doctor: ("report.json", ".report.json.tmp"),
    exported: ("best.safetensors", ".best.safetensors.tmp"),
    swept: ("x__sweep", "x__sweep/multirun.yaml"),
}


@pytest.fixture
def victims(tmp_path: Path) -> Path:
    folder = tmp_path / "victims"
    (folder / "album").mkdir(parents=True)
    (folder / "photo.jpg").write_bytes(b"mine")
    (folder / "album" / "photo.jpg").write_bytes(b"mine too")
    return folder


@pytest.fixture
def impatient() -> Iterator[None]:
    """What waits for a pipe is interrupted."""

    def give_up(number: int, frame: FrameType | None) -> NoReturn:
        pytest.fail("hangs")  # no Exception, which a run takes for a tracker's

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(1000)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("act", "name", "kind"),
    [
        pytest.param(act, name, kind, id=f"{act.__name__} {name}, {kind}")
        for act in NAMES
        for name in NAMES[act]
        for kind in KINDS
        if kind != "a second name" or name.endswith((".txt", ".jsonl", "lock", "multirun.yaml"))
    ],
)
def test_what_is_planted_leads_nowhere(act: Act, name: str, kind: str, tmp_path: Path, victims: Path) -> None:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    before, planted = state_of(victims), list[str]()

    def plant() -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
        KINDS[kind](path, victims)
        planted.append(name)

    with suppress(RetinaError, OSError):  # which a program tells in one line
        act(folder, plant)
    assert planted, "the program got as far as that"
    assert state_of(victims) == before


def state_of(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "checkpoints", "tensorboard", "trackers"])
def test_a_run_that_cannot_add_to_its_files_is_refused(name: str, tmp_path: Path, victims: Path) -> None:
    for kind, plant in KINDS.items():
        if kind == "a second name":
            continue
        folder = tmp_path / kind
        open_run(folder, {"name": "x"}, overwrite=False)
        plant(folder / name, victims)
        with refused("not-written", folder, name):
            open_run(folder, {"name": "x"}, overwrite=False)


def test_a_second_name_of_a_log_keeps_what_it_had(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "log.txt")
    appender.write(b"first\n")
    appender.close()
    os.link(tmp_path / "log.txt", tmp_path / "backup.txt")
    appender.write(b"second\n")
    appender.close()
    assert (tmp_path / "backup.txt").read_bytes() == b"first\n"
    assert (tmp_path / "log.txt").read_bytes() == b"first\nsecond\n"


def test_programs_end_in_one_line(tool: Tool, tiny_data: Path, tmp_path: Path, capsys: Capture) -> None:
    """A training whose log is a pipe, and an evaluation whose folder is a link."""
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_bytes(MARK)
    os.mkfifo(run / "log.txt")
    words = ["experiment=shapes", f"data.root={tiny_data}", f"runs={tmp_path}/runs", "name=x", "train.device=cpu"]
    assert tool("train", *words) == 2
    assert "log.txt: is a link or no plain file" in one_line(capsys)
    trained = write_tiny_run(tmp_path / "trained", tiny_data)
    (tmp_path / "elsewhere").mkdir()
    (trained / "eval").symlink_to(tmp_path / "elsewhere")
    assert tool("eval", f"checkpoint={trained}") == 2
    assert "is a link or no folder" in one_line(capsys)
    assert list((tmp_path / "elsewhere").iterdir()) == []
