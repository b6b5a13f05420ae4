"""A detector in Python: every kind of image gives the same detections, in the image's own pixels."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retina
from faults import refused
from retina.data.coco import read_coco
from retina.data.images import read_image
from retina.data.transforms import eval_pipeline
from retina.detections import postprocess
from retina.errors import CheckpointError, ConfigError, DataError
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.inference import Detector, as_array, check_postprocess
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard, load_detector, read_card, save_detector
from retina.types import Detections
from retina.visualize import draw_detections
from tiny import PREPROCESSING, write_tiny_data, write_tiny_run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than such small images do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inference")
    return write_tiny_run(root / "run", write_tiny_data(root / "data"))


@pytest.fixture(scope="module")
def detector(run: Path) -> Detector:
    return retina.load(run)


@pytest.fixture(scope="module")
def files(run: Path) -> list[Path]:
    return sorted((run.parent / "data" / "val").glob("*.jpg"))


def assert_equal(one: list[Detections], two: list[Detections], tolerance: float = 0) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=tolerance)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=tolerance)


def test_files_of_16_bits_are_read_in_the_range_of_the_header(run: Path, tmp_path: Path) -> None:
    model, card = load_detector(run / "best.safetensors", torch.device("cpu"))
    card = replace(card, preprocessing=card.preprocessing | {"value_range": [100, 4100]})
    save_detector(tmp_path / "deep.safetensors", model.state_dict(), card)
    detector = retina.load(tmp_path / "deep.safetensors")
    values = np.random.default_rng(0).integers(0, 5000, (64, 96), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    array = np.repeat(np.clip((values.astype(int) - 100) * 255 // 4000, 0, 255)[..., None], 3, axis=2)
    (file,), (expected,) = detector.predict([tmp_path / "a.png"]), detector.predict([array.astype(np.uint8)])
    assert len(expected.scores) > 0
    assert_equal([file], [expected])


def test_every_kind_of_image_gives_the_same(detector: Detector, files: list[Path]) -> None:
    arrays = [read_image(file) for file in files]
    expected = detector.predict(files)
    assert sum(len(found.scores) for found in expected) > 20
    kinds: list[list[Any]] = [
        [str(file) for file in files],
        arrays,
        [Image.fromarray(array) for array in arrays],
        [torch.from_numpy(array).permute(2, 0, 1) for array in arrays],
        [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays],
        [array[::-1][::-1] for array in arrays],
    ]
    for images in kinds:
        assert_equal(detector.predict(images), expected)
    mixed = [kind[i] for i, kind in enumerate(kinds[: len(files)])]
    assert_equal(detector.predict(mixed), expected)


def test_detections_are_valid_and_best_first(detector: Detector, files: list[Path]) -> None:
    for file, found in zip(files, detector.predict(files, score_threshold=0.2), strict=True):
        height, width, _ = read_image(file).shape
        assert found.boxes.device.type == "cpu"
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (found.scores > 0.2).all()
        assert (found.scores.diff() <= 0).all()
        assert (found.labels < len(detector.classes)).all()


def test_boxes_are_in_pixels_of_the_original(detector: Detector, files: list[Path]) -> None:
    """An image four times as large is resized to the same input, so its boxes are four times as large."""
    small = read_image(files[0])
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    one, two = detector.predict([small, large], batch_size=1)
    assert len(one.scores) > 3
    assert one.labels.tolist() == two.labels.tolist()
    torch.testing.assert_close(4 * one.boxes, two.boxes, rtol=0, atol=1e-3)


def test_exif_rotation_of_files(detector: Detector, files: list[Path], tmp_path: Path) -> None:
    image = Image.fromarray(read_image(files[0]))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert_equal(detector.predict([tmp_path / "turned.png"]), detector.predict([image]))


def test_evaluation_and_prediction_agree_whatever_lies_in_a_batch(run: Path, tmp_path: Path) -> None:
    """Images of different sizes, a head that normalises over its maps, and a backbone whose BatchNorm was trained."""
    card = read_card(run / "best.safetensors")
    torch.manual_seed(1)
    model = retinanet(**card.model | {"head_norm": "group", "norm": "batch"})
    with torch.no_grad():
        model.head.classification.predict.weight.normal_(std=0.3)
        model.head.box.predict.weight.normal_(std=0.05)
    weights = tmp_path / "best.safetensors"
    save_detector(weights, model.state_dict(), replace(card, model=model.arguments))
    detector = Detector.load(weights)
    rng, files = np.random.default_rng(0), []
    sizes = [(96, 64), (64, 96), (96, 40), (64, 64), (90, 30)]  # width, height
    for number, size in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        files.append(tmp_path / f"{number}.png")
        coarse.resize(size, Image.Resampling.BICUBIC).save(files[-1])
    alone = detector.predict(files, batch_size=1)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        for batch_size in (2, 3, 5):
            found = detector.predict([files[i] for i in order], batch_size=batch_size)
            assert_equal(found, [alone[i] for i in order], tolerance=1e-3)

    objects = []  # those of the second to the sixth detection: what comes before or after them is wrong
    for image, one in enumerate(alone):
        objects += [(image, box, label) for box, label in zip(one.boxes.tolist(), one.labels.tolist(), strict=True)][
            1:6
        ]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
            for i, (width, height) in enumerate(sizes)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(card.classes)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "iscrowd": 0}
            for n, (i, (x1, y1, x2, y2), k) in enumerate(objects)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "a.json", tmp_path)
    precisions = []
    for batch_size in (1, 2, 5):
        loader = retina.eval_loader(annotations, eval_pipeline(64, 96), batch_size=batch_size, canvas=detector.canvas)
        model, _ = load_detector(weights, torch.device("cpu"))
        options = {"postprocess": partial(postprocess, **card.postprocess)}
        precisions.append(retina.evaluate(model, loader, annotations, **options).metrics["AP"])
    indices = np.repeat(np.arange(len(files)), [len(one.scores) for one in alone])
    columns = zip(*(one.tensors for one in alone), strict=True)
    boxes, scores, labels = (torch.cat(parts).numpy().astype(float) for parts in columns)
    arrays = DetectionArrays(indices, boxes, scores, labels.astype(np.int64))
    precisions.append(coco_metrics(annotations, arrays)["AP"])
    assert 0.1 < precisions[0] < 1
    assert precisions == pytest.approx([precisions[0]] * 4, abs=1e-3)


def test_batches_do_not_mix_images(detector: Detector, files: list[Path]) -> None:
    images = [image for image in map(read_image, files) if image.shape == read_image(files[0]).shape]
    images.append(images[0])
    together = detector.predict(images, batch_size=8)
    assert_equal(together, detector.predict(images, batch_size=1), tolerance=1e-3)
    assert_equal(together[:1], together[-1:], tolerance=1e-3)


def test_thresholds(detector: Detector, files: list[Path]) -> None:
    low, high = (detector.predict(files, score_threshold=threshold) for threshold in (0.05, 0.9))
    assert_equal(low, detector.predict(files))
    assert sum(len(found.scores) for found in high) < sum(len(found.scores) for found in low)
    assert all((found.scores > 0.9).all() for found in high)
    with pytest.raises(ValueError, match="score_threshold"):
        detector.predict(files, score_threshold=2.0)
    with pytest.raises(ValueError, match=r"batch_size"):
        detector.predict(files, batch_size=0)


def test_nothing_in_nothing_out(detector: Detector) -> None:
    assert detector.predict([]) == []
    (found,) = detector.predict([np.zeros((64, 64, 3), np.uint8)], score_threshold=0.999)
    assert (found.boxes.shape[1], found.labels.dtype) == (4, torch.int64)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        Image.new("I;16", (8, 8)),
        Image.new("F", (8, 8)),
        None,
        7,
        [[1]],
    ],
    ids=lambda image: f"{type(image).__name__} {getattr(image, 'shape', '')}",
)
def test_what_is_no_image_is_a_type_error(image: Any) -> None:
    with pytest.raises(TypeError, match=r"is no image: give a path, a uint8 array \[H W 3\]"):
        as_array(image)


def test_a_single_image_is_a_list_of_one(detector: Detector, files: list[Path]) -> None:
    array = read_image(files[0])
    expected = detector.predict(files[:1])
    images: list[Any] = [
        str(files[0]),
        files[0],
        Image.fromarray(array),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    for image in images:
        assert_equal(detector.predict(image), expected)


def test_any_iterable_is_read_one_batch_at_a_time(detector: Detector, files: list[Path]) -> None:
    asked: list[int] = []

    def images() -> Iterator[Path]:
        for index, file in enumerate(files):
            asked.append(index)
            yield file
        raise RuntimeError("the end")

    with pytest.raises(RuntimeError, match="the end"):
        detector.predict(images(), batch_size=2)
    assert asked == list(range(len(files)))
    assert_equal(detector.predict((file for file in files), batch_size=8), detector.predict(files, batch_size=8))
    assert_equal(detector.predict(dict.fromkeys(files)), detector.predict(files))


def test_the_home_folder_may_be_written_short(
    run: Path, detector: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    short = f"~/{files[0].relative_to(run.parent)}"
    assert_equal(detector.predict(short), detector.predict(files[0]))
    assert retina.load("~/run", device="cpu").classes == detector.classes


def test_grey_and_transparent_pil_images() -> None:
    assert as_array(Image.new("L", (4, 2), 9)).tolist() == [[[9, 9, 9]] * 4] * 2
    assert as_array(Image.new("RGBA", (1, 1), (1, 2, 3, 0))).tolist() == [[[1, 2, 3]]]
    assert as_array(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


def test_unreadable_file(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.jpg"):
        detector.predict([tmp_path / "a.jpg"])


def test_images_of_too_many_pixels_are_refused(detector: Detector, files: list[Path]) -> None:
    height, width, _ = read_image(files[0]).shape
    detector.predict(files[:1], max_pixels=height * width)
    with pytest.raises(DataError, match=rf"{files[0].name}: .*{width}x{height} pixels"):
        detector.predict(files[:1], max_pixels=height * width - 1)


def test_a_model_that_has_diverged_is_refused(run: Path, files: list[Path]) -> None:
    broken = retina.load(run, device="cpu")
    with torch.no_grad():
        broken.model.head.classification.predict.bias[0] = float("nan")
    with pytest.raises(DataError, match=r"best\.safetensors: \d+ predicted boxes have .* not a finite number - the"):
        broken.predict(files[:1])


def test_weights_alone_are_enough(run: Path, files: list[Path], detector: Detector, tmp_path: Path) -> None:
    shutil.copy(run / "best.safetensors", tmp_path / "mine.safetensors")
    alone = retina.load(str(tmp_path / "mine.safetensors"), device="cpu")
    assert alone.classes == detector.classes == ("circle", "rectangle", "triangle", "star", "ring")
    assert_equal(alone.predict(files), detector.predict(files))


def test_precision(run: Path, files: list[Path]) -> None:
    coarse = retina.load(run, precision="bf16")
    assert coarse.dtype == torch.bfloat16
    assert len(coarse.predict(files[:1])) == 1
    with refused("unknown-value", "precision: 'int8'", kind=ConfigError):
        Detector.load(run, precision="int8")


@pytest.mark.parametrize(("norm", "precision"), [("frozen", "fp32"), ("batch", "bf16")])
def test_a_detector_with_every_switch(norm: str, precision: str, tmp_path: Path) -> None:
    """Merged norms and all, it finds what its model and `postprocess` find."""
    torch.manual_seed(0)
    model = retinanet(
        num_classes=3, backbone="resnet18", norm=norm, norm_eps=1e-3, fpn_channels=32, head_convs=1, head_norm="group",
        levels=[2, 3, 4, 5, 6], neck="pafpn", p6_from="p5", p7_relu=False, head_quality=True, box_bins=9,
        anchor_scales=[2.0], anchor_ratios=[1.0], anchor_offset=0.5, prior=0.1,
    )  # fmt: skip
    with torch.no_grad():
        model.head.classification.predict.weight.normal_(std=0.5)
        model.head.box.predict.weight.normal_(std=0.3)
        model.head.box.quality.weight.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    preprocessing = PREPROCESSING | {"precision": precision}
    options = {"score_threshold": 0.3, "max_detections": 20}
    card = DetectorCard(
        model=model.arguments,
        classes=["a", "b", "c"],
        category_ids=[1, 2, 3],
        preprocessing=preprocessing,
        postprocess=options,
    )
    save_detector(tmp_path / "best.safetensors", model.state_dict(), card)
    detector = retina.load(tmp_path, device="cpu")
    assert not [name for name, _ in detector.model.named_buffers() if name.endswith("running_var")]
    assert detector.model.arguments == model.arguments
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    found = detector.predict(list(images))
    with torch.no_grad():
        expected = postprocess(model.eval()(images), torch.tensor([[64, 96]] * 2), **options)
    assert all(len(one.scores) == 20 for one in found)
    if precision == "fp32":
        assert_equal(found, expected, tolerance=1e-2)
    else:  # of numbers with 8 bits, the order differs
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0.1)


def fault_of(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        retina.load(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value)


def with_card(source: Path, target: Path, change: dict[str, Any]) -> Path:
    """A copy of a weights file whose description says something else."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["retina"]) | change
    described.pop("sha256")  # as in files of earlier versions
    header["__metadata__"]["retina"] = json.dumps(described)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def test_missing_and_damaged_weights(run: Path, tmp_path: Path) -> None:
    best = run / "best.safetensors"
    assert "no such file" in fault_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no best.safetensors" in fault_of(tmp_path / "empty")
    (tmp_path / "cut.safetensors").write_bytes(best.read_bytes()[:-100])
    assert "cannot be read" in fault_of(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "cannot be read" in fault_of(tmp_path / "text.safetensors")


def test_weights_of_another_architecture(run: Path, tmp_path: Path) -> None:
    best, target = run / "best.safetensors", tmp_path / "other.safetensors"
    model = read_card(best).model
    assert "another architecture" in fault_of(with_card(best, target, {"model": model | {"fpn_channels": 32}}))
    assert "another architecture" in fault_of(with_card(best, target, {"model": model | {"head_convs": 2}}))
    assert "header" in fault_of(with_card(best, target, {"model": model | {"depth": 3}}))
    assert "header" in fault_of(with_card(best, target, {"model": model | {"backbone": "resnet7"}}))
    assert "schema version 99" in fault_of(with_card(best, target, {"schema_version": 99}))
    without = {key: value for key, value in PREPROCESSING.items() if key != "pad_multiple"}
    assert "header: preprocessing lacks 'pad_multiple'" in fault_of(with_card(best, target, {"preprocessing": without}))


def test_check_postprocess() -> None:
    check_postprocess({"score_threshold": 0.1, "nms_iou": 0.6})
    for options in ({"nms_iou": 7.0}, {"max_detections": 0}, {"score_threshold": -1.0}):
        with pytest.raises(ValueError, match="got"):
            check_postprocess(options)


def test_importing_retina_loads_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys, retina
assert "load" in dir(retina) and not hasattr(retina, "laod")
print([name for name in ("torch", "numpy", "hydra", "omegaconf") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_batches_are_found_as_they_come(detector: Detector, files: list[Path]) -> None:
    """Read ahead, but not further than asked for, from an iterable without end."""
    asked: list[Path] = []

    def endless() -> Iterator[Path]:
        while True:
            for file in files:
                asked.append(file)
                yield file

    batches = detector.predict_batches(endless(), batch_size=2, prefetch=1)
    assert not asked
    expected = detector.predict(files, batch_size=2)
    for number in range(0, 4, 2):
        assert_equal(next(batches), expected[number : number + 2])
        assert len(asked) <= number + 6
    batches.close()  # type: ignore[attr-defined]  # it is a generator

    assert_equal([found for batch in detector.predict_batches(files, batch_size=2) for found in batch], expected)
    (whole,) = detector.predict_batches(files, batch_size=9, prefetch=0)
    assert_equal(whole, detector.predict(files))
    assert [*detector.predict_batches([])] == []


def test_batches_tell_of_mistakes_at_once_and_of_files_in_their_turn(
    detector: Detector, files: list[Path], tmp_path: Path
) -> None:
    for wrong in ({"batch_size": 0}, {"prefetch": -1}, {"score_threshold": 1.5}):
        with pytest.raises(ValueError, match=r"batch_size|prefetch|score_threshold"):
            detector.predict_batches(files, **wrong)  # type: ignore[arg-type]
    (tmp_path / "bad.jpg").write_bytes(files[0].read_bytes()[:500])
    batches = detector.predict_batches([files[0], tmp_path / "bad.jpg", files[1]], batch_size=1)
    assert len(next(batches)) == 1
    with refused("bad-image", f"{tmp_path}/bad.jpg"):
        next(batches)


def test_a_result_counts_selects_and_draws(detector: Detector, files: list[Path]) -> None:
    (found,) = detector.predict(files[0], score_threshold=0.3)
    assert len(found) == len(found.scores) > 3
    rows = found.records()
    assert rows == [*found]
    assert [row["class"] for row in rows] == [detector.classes[k] for k in found.labels]
    corners = [[row[key] for key in ("x1", "y1", "x2", "y2")] for row in rows]
    assert corners == found.boxes.tolist()
    assert [row["score"] for row in rows] == found.scores.tolist()
    name = rows[0]["class"]
    assert found[name].records() == [row for row in rows if row["class"] == name]
    assert sum(len(found[one]) for one in detector.classes) == len(found)
    with pytest.raises(KeyError, match="unicorn"):
        found["unicorn"]
    drawn = np.asarray(found.draw())
    np.testing.assert_array_equal(drawn, draw_detections(read_image(files[0]), found.tensors, detector.classes))
    image = read_image(files[0])
    (of_array,) = detector.predict([image], score_threshold=0.3)
    np.testing.assert_array_equal(np.asarray(of_array.draw()), drawn)
    (streamed,) = detector.predict(iter([image]), score_threshold=0.3)
    with pytest.raises(ValueError, match="not kept"):
        streamed.draw()
    np.testing.assert_array_equal(np.asarray(streamed.draw(image)), drawn)


def test_settings_of_an_adjusted_detector(detector: Detector, files: list[Path]) -> None:
    usual = detector.predict(files)
    names = [detector.classes[1]]
    only = detector.adjusted(classes=names, class_agnostic=False).predict(files)
    for one, all_ in zip(only, usual, strict=True):
        among_all = all_[names[0]].tensors  # no others take their place among the best max_detections
        assert_equal([Detections(*(values[: len(among_all.scores)] for values in one.tensors))], [among_all])
    agnostic = detector.adjusted(class_agnostic=True)
    assert [one.records() for one in agnostic.predict(files)] != [one.records() for one in usual]
    # a class that does not count suppresses none that does
    assert_equal(agnostic.adjusted(classes=names).predict(files), only, tolerance=1e-3)
    assert detector.adjusted(short_side=32).predict(files)[0].records() != usual[0].records()
    assert_equal(detector.predict(files), usual)
    for settings, key in [
        ({"nms_iou": 2.0}, "nms_iou"),
        ({"short_side": 0}, "short_side"),
        ({"classes": []}, "classes"),
    ]:
        with refused("out-of-range", key, kind=ConfigError):
            detector.adjusted(**settings)
