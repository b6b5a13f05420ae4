"""A trained detector as a Python object: from images to detections in their pixels."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from retina.data.channels import LIKE_RGB
from retina.data.images import MAX_PIXELS, read_image, read_reduced
from retina.data.loader import Canvas, collate
from retina.data.pixels import AS_STORED, FULL, PixelFormat, as_grey
from retina.data.prefetch import run_ahead
from retina.data.regions import Regions, regions_of
from retina.data.transforms import Sample, eval_pipeline
from retina.data.windows import Tiling
from retina.detections import count_non_finite, postprocess, refuse_non_finite, to_original
from retina.distributed import choose_device
from retina.errors import CheckpointError, ConfigError, check, check_choice
from retina.model.folding import merge_norms
from retina.model.header import PREPROCESSING
from retina.model.retinanet import RetinaNet
from retina.model.weights import DetectorCard, load_detector
from retina.ops.seams import is_cut, merge
from retina.precision import float32_as
from retina.types import DTYPES, Batch, Detections, Predictions, to_device
from retina.visualize import AS_IT_FITS, DrawStyle, draw_detections

T = TypeVar("T")
ImageLike = str | Path | np.ndarray | Image.Image | Tensor | Sample
"""A path, a uint8 array [H W C], a PIL image, a uint8 tensor [C H W], or what `Detector.read` makes of these."""


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """What was detected in one image, best first.

    (found,) = detector.predict("a.jpg")
    print(len(found), len(found["cell"]), found.records())
    found.draw().save("drawn.png")
    """

    boxes: Float[Tensor, "D 4"]
    """xyxy in pixels of the image."""
    scores: Float[Tensor, "D"]
    labels: Int64[Tensor, "D"]
    classes: tuple[str, ...]
    """Label k is `classes[k]`."""
    image: ImageLike | None = None
    """As it was given; None where it came from an iterator, whose images are not kept."""
    pixels: PixelFormat = AS_STORED

    @property
    def tensors(self) -> Detections:
        """Boxes, scores and labels alone."""
        return Detections(self.boxes, self.scores, self.labels)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records())

    def __getitem__(self, name: str) -> "ImageDetections":
        """Those of one class. Raises KeyError for a class that the detector does not have."""
        if name not in self.classes:
            raise KeyError(f"{name!r} - choose one of {', '.join(self.classes)}")
        keep = self.labels == self.classes.index(name)
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def records(self) -> list[dict[str, Any]]:
        """A row for each, with the keys class, label, score, x1, y1, x2, y2: `pandas.DataFrame(found.records())`."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {"class": self.classes[label], "label": label, "score": score}
            | dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
            for box, score, label in rows
        ]

    def draw(self, image: ImageLike | None = None, *, style: DrawStyle = AS_IT_FITS) -> Image.Image:
        """The image with its detections. Raises DataError for a file that cannot be read any more, TypeError for
        anything that is no image, ValueError where it is not known."""
        image = self.image if image is None else image
        if image is None:
            raise ValueError("the image was not kept: give it, draw(image)")
        if isinstance(image, (str, Path)):
            array = read_image(Path(image).expanduser(), pixels=self.pixels)
        else:
            array = image.image if isinstance(image, Sample) else as_array(image, self.pixels.channels)
        return Image.fromarray(draw_detections(array, self.tensors, self.classes, score_threshold=0.0, style=style))


class Detector:
    """Model, preprocessing and thresholds of one weights file.

    detector = retina.load("runs/bccd")
    for detections in detector.predict(["a.jpg", "b.jpg"]):
        print(detections.boxes, detections.scores, [detector.classes[k] for k in detections.labels])
    """

    def __init__(self, model: RetinaNet, card: DetectorCard, *, device: torch.device, file: Path) -> None:
        """Changes the model in place, so that it can only be used for inference at this precision.

        Raises ConfigError for an unknown precision in `card.preprocessing`, CheckpointError for a missing setting."""
        for key in PREPROCESSING:
            if key not in card.preprocessing:
                problem = f"preprocessing lacks {key!r} - restore it from a copy"
                raise CheckpointError(f"{file}: header: {problem}", code="bad-header")
        precision = card.preprocessing["precision"]
        check_choice(precision, DTYPES, "precision")
        self.card, self.device, self.file, self.dtype = card, device, file, DTYPES[precision]
        self._precision = precision
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        merge_norms(self.model)
        for layer in self.model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(self.dtype)  # once; autocast would convert the weights for every level of every batch
        self._process = os.getpid()
        self.canvas = Canvas(card.preprocessing["pad_multiple"], tuple(card.preprocessing["pad_value"]))
        value_range = card.preprocessing.get("value_range") or FULL
        self.pixels = PixelFormat(tuple(value_range), channels=len(self.canvas.pad_value))
        """How values of image files are read."""
        self.tiling = tiling_of(card.preprocessing)
        """How large images are cut; None: they are looked at as a whole."""
        self._resize = eval_pipeline(card.preprocessing["short_side"], card.preprocessing["long_side"])
        self._hidden: list[int] = []
        """Labels that do not count."""

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, device: str = "auto", precision: str | None = None, plugins: Sequence[str] = ()
    ) -> "Detector":
        """From a run folder (its `best.safetensors`) or a `.safetensors` file, which needs nothing beside it.

        precision: `fp32`, `tf32`, `bf16` or `fp16`; None is what it was trained and evaluated with.
        plugins: packages whose backbones, necks and heads the file may name. They are imported, so name only those that
            you trust.

        Raises CheckpointError when there is none, it is damaged, or of another architecture or version, ConfigError for
        an unknown precision, ValueError for a device that is not there."""
        chosen = choose_device(device)
        file = find_weights(Path(checkpoint).expanduser())
        model, card = load_detector(file, chosen, plugins=plugins)
        if precision is not None:
            card = replace(card, preprocessing=card.preprocessing | {"precision": precision})
        return cls(model, card, device=chosen, file=file)

    @property
    def classes(self) -> tuple[str, ...]:
        """Label k is `classes[k]`."""
        return tuple(self.card.classes)

    @property
    def thresholds(self) -> list[float]:
        """The score threshold of each label at the operating point of the weights; empty where they have none."""
        return [one["threshold"] for one in self.card.operating_point.get("classes", [])]

    def adjusted(
        self,
        *,
        short_side: int | None = None,
        long_side: int | None = None,
        nms_iou: float | None = None,
        class_agnostic: bool | None = None,
        classes: Sequence[str] | None = None,
    ) -> "Detector":
        """The same model with other settings; None leaves one as it is.

        short_side, long_side: pixels that images are resized to before they are looked at.
        nms_iou, class_agnostic: as of `postprocess`.
        classes: the only ones that are looked for; labels keep their meaning.

        Raises ConfigError for a value out of range or a class that it does not have."""
        preprocessing = dict(self.card.preprocessing)
        preprocessing |= {k: v for k, v in (("short_side", short_side), ("long_side", long_side)) if v is not None}
        options = {k: v for k, v in (("nms_iou", nms_iou), ("class_agnostic", class_agnostic)) if v is not None}
        short, long = preprocessing["short_side"], preprocessing["long_side"]
        check(short >= 1, "short_side", short, "give 1 or more")
        check(long is None or long >= short, "long_side", long, f"give at least short_side={short}")
        check(nms_iou is None or 0 <= nms_iou <= 1, "nms_iou", nms_iou, "give 0 to 1")
        for name in classes or ():
            check_choice(name, self.classes, "classes")
        if classes is not None and not classes:
            raise ConfigError("is empty - name one or more, or give null for all", code="out-of-range", key="classes")
        other = copy.copy(self)
        other.card = replace(self.card, preprocessing=preprocessing, postprocess=self.card.postprocess | options)
        other._resize = eval_pipeline(short, long)
        if classes is not None:
            other._hidden = [label for label, name in enumerate(self.classes) if name not in classes]
        return other

    def in_tiles(self, tiling: Tiling | None) -> "Detector":
        """The same detector with other tiles, or none. Raises ConfigError for tiles out of range."""
        if tiling:
            tiling.check()
        other = copy.copy(self)
        other.tiling = tiling
        return other

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
    ) -> list[ImageDetections]:
        """Detections of each image, on the CPU, best first, boxes xyxy in the image's own pixels.

        images: paths, uint8 arrays [H W C], PIL images or uint8 tensors [C H W], in any iterable; kinds and sizes may
            differ. All are RGB, unless the detector was trained on other channels. A single image gives a list of one.
            Boxes of a file are in pixels of the image after its EXIF rotation; that of a PIL image is not applied.
        score_threshold: None takes that of each class at the operating point of the weights (`thresholds`), or, where
            they have none, what the detector was evaluated with (0.05 unless it was trained with another).
        batch_size: images (or tiles) per forward, and in memory. Detections do not depend on it, except by rounding.
        max_pixels: files with more are refused before they are decoded.

        Raises DataError for a file that cannot be read or when predicted numbers are not finite, TypeError for anything
        that is no image, ValueError for a threshold or batch size out of range."""
        given, seen = listed(images), list[ImageLike | None]()
        keeps = isinstance(given, Sequence)

        def noted() -> Iterator[ImageLike]:
            for image in given:
                seen.append(image if keeps or isinstance(image, (str, Path)) else None)
                yield image

        rules: Any = {"score_threshold": score_threshold, "batch_size": batch_size, "max_pixels": max_pixels}
        detections = self._predict_any(noted(), **rules)
        return [self.of_image(one, image) for one, image in zip(detections, seen, strict=True)]

    def of_image(self, detections: Detections, image: ImageLike | None = None) -> ImageDetections:
        """With their classes, and the image if it is to be kept."""
        return ImageDetections(*detections, self.classes, image, self.pixels)

    def _predict_any(
        self, images: Iterable[ImageLike], *, score_threshold: float | None, batch_size: int, max_pixels: int
    ) -> list[Detections]:
        check_batch_size(batch_size)
        predict = partial(self._predict, score_threshold=score_threshold, batch_size=batch_size, max_pixels=max_pixels)
        if not self.tiling:
            return predict(images)
        rules = {
            key: self.card.postprocess[key] for key in ("nms_iou", "class_agnostic") if key in self.card.postprocess
        }
        options: Any = {"tiling": self.tiling, "batch_size": batch_size, **rules}
        return [detect_in_tiles(predict, self.read(image, max_pixels).image, **options) for image in images]

    def _predict(
        self, images: Iterable[ImageLike], *, score_threshold: float | None, batch_size: int, max_pixels: int
    ) -> list[Detections]:
        """Of images that are not cut."""
        rules = self._rules(score_threshold)
        check_postprocess(rules[0])
        batches = (
            self._batch([self._read(image, max_pixels) for image in chunk]) for chunk in chunked(images, batch_size)
        )
        return [detections for batch in batches for detections in self._find(batch, *rules)]

    def predict_batches(
        self,
        images: Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
    ) -> Iterator[list[ImageDetections]]:
        """What `predict` returns, `batch_size` images at a time, for more images than there is room for at once.

        prefetch: batches that threads read, and put on their canvas, ahead of the one that is looked at.

        The threads live as long as the iteration, which goes on in the process that began it alone: in a fork it raises
        RuntimeError. An image that cannot be read raises DataError in its turn and ends the iteration. Otherwise as
        `predict`, which threads may call at the same time, and forks of the process, which then compute with one
        thread; on CUDA a fork cannot."""
        if prefetch < 0:
            raise ValueError(f"prefetch must be 0 or more, got {prefetch}")
        chunks = chunked(listed(images), batch_size)
        check_postprocess(self._rules(score_threshold)[0])
        find = partial(self.find, score_threshold=score_threshold, batch_size=batch_size)
        return self._find_ahead(chunks, find, max_pixels, prefetch)

    def _find_ahead(
        self,
        chunks: Iterable[list[ImageLike]],
        find: Callable[[Any], list[Detections]],
        max_pixels: int,
        prefetch: int,
    ) -> Iterator[list[ImageDetections]]:
        process = os.getpid()
        with ThreadPoolExecutor() as threads:

            def begin(chunk: list[ImageLike]) -> Future[Any]:
                images = [threads.submit(self.read, image, max_pixels) for image in chunk]
                files = [image if isinstance(image, (str, Path)) else None for image in chunk]
                return threads.submit(lambda: (files, self.prepare([image.result() for image in images])))

            for files, batch in run_ahead(begin, chunks, prefetch + 1):
                yield [self.of_image(one, file) for one, file in zip(find(batch), files, strict=True)]
                if os.getpid() != process:
                    raise RuntimeError("predict_batches goes on in the process that began it only: begin anew here")

    def prepare(self, samples: Sequence[Sample]) -> Any:
        """What `find` takes, of images that `read` has read; any thread may make it."""
        return list(samples) if self.tiling else self._batch(samples)

    def find(self, batch: Any, *, score_threshold: float | None = None, batch_size: int = 8) -> list[Detections]:
        """`predict` for images that `prepare` has put together; batch_size: tiles per forward."""
        if self.tiling:
            rules: Any = {"score_threshold": score_threshold, "batch_size": batch_size, "max_pixels": MAX_PIXELS}
            return self._predict_any(batch, **rules)
        return self._find(batch, *self._rules(score_threshold))

    def _rules(self, score_threshold: float | None) -> tuple[dict[str, Any], list[float]]:
        """Options of `postprocess`, and the threshold of each label where the weights' own apply."""
        options = dict(self.card.postprocess)
        thresholds = self.thresholds if score_threshold is None else []
        if score_threshold is not None:
            options["score_threshold"] = score_threshold
        elif thresholds:
            options["score_threshold"] = min(thresholds)
        return options, thresholds

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        return collate([self._resize.without_last_resize(sample, 0) for sample in samples], self.canvas)

    def _find(self, batch: Batch, options: Mapping[str, Any], thresholds: Sequence[float]) -> list[Detections]:
        detections = self.detect(batch, options)
        return [at_thresholds(image, thresholds) for image in detections] if thresholds else detections

    def read(self, image: object, max_pixels: int = MAX_PIXELS) -> Sample:
        """An image as evaluation would read it, without objects: a large JPEG may be decoded smaller, and where the
        detector works in tiles, a TIFF may be left on the disk (`retina.data.regions`).

        Raises DataError for a file that cannot be read, TypeError for anything that is no image."""
        if self.tiling and isinstance(image, (str, Path)):
            regions = regions_of(Path(image).expanduser(), max_pixels=max_pixels, pixels=self.pixels)
            return _sample(regions, (regions.shape[0], regions.shape[1]))
        return self._read(image, max_pixels)

    def _read(self, image: object, max_pixels: int) -> Sample:
        if isinstance(image, Sample):
            return image
        if isinstance(image, (str, Path)):
            reading: Any = {"max_pixels": max_pixels, "pixels": self.pixels}
            array, size = read_reduced(Path(image).expanduser(), self._resize.least_size, **reading)
        else:
            array = as_array(image, self.pixels.channels)
            size = array.shape[0], array.shape[1]
        return _sample(array, size)

    @torch.no_grad()
    def detect(self, batch: Batch, options: Mapping[str, Any]) -> list[Detections]:
        """Detections of each image of a batch, as `predict` returns them. `options` are those of `postprocess`."""
        if os.getpid() != self._process:
            torch.set_num_threads(1)  # OpenMP's threads are not in a fork, which would wait for them for ever
            self._process = os.getpid()
        on_device = to_device(batch, self.device)
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, float32_as(self._precision):
            predictions = self.model(on_device.images, on_device.sizes)
        refuse_non_finite(int(count_non_finite(predictions)), self.file)
        if self._hidden:
            hidden = torch.tensor(self._hidden, device=self.device)
            shown = (level.index_fill(-1, hidden, -torch.inf) for level in predictions.logits)
            predictions = predictions._replace(logits=tuple(shown))
        detections = postprocess(predictions, on_device.sizes, **options)
        counts = [len(image.scores) for image in detections]
        # One copy to the CPU per field, not per image.
        fields = (torch.cat(tensors).cpu().split(counts) for tensors in zip(*detections, strict=True))
        rows = zip(zip(*fields, strict=True), batch.sizes, batch.original_sizes, strict=True)
        return [to_original(Detections(*row), size, original) for row, size, original in rows]


def detect_in_tiles(
    predict: Callable[[Sequence[np.ndarray]], Sequence[Detections]],
    image: np.ndarray | Regions,
    tiling: Tiling,
    *,
    nms_iou: float = 0.5,
    class_agnostic: bool = False,
    batch_size: int = 8,
) -> Detections:
    """Detections of a large image, best first, boxes in its pixels. At most `batch_size` tiles are in memory.

    predict: finds objects in images, such as `Detector.predict`."""
    size = image.shape[0], image.shape[1]
    parts: list[Detections] = []
    cut: list[Tensor] = []
    windows = iter(tiling.windows(size))
    while batch := list(islice(windows, batch_size)):
        tiles = [image[top:bottom, left:right] for top, left, bottom, right in batch]
        for window, part in zip(batch, predict(tiles), strict=True):
            corner = part.boxes.new_tensor([window[1], window[0]] * 2)
            parts.append(part._replace(boxes=part.boxes + corner))
            cut.append(is_cut(part.boxes, window, size))
    if tiling.whole:
        shrunk, factor = image.shrunk(MAX_PIXELS) if isinstance(image, Regions) else (image, 1)
        (part,) = predict([shrunk])
        parts.append(part._replace(boxes=part.boxes * factor))
        cut.append(torch.zeros(len(part.scores), dtype=torch.bool))
    detections = Detections(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    return merge(detections, torch.cat(cut), nms_iou=nms_iou, class_agnostic=class_agnostic)


def tiling_of(preprocessing: Mapping[str, Any]) -> Tiling | None:
    """What the weights were trained and evaluated with."""
    if not preprocessing.get("tile"):
        return None
    rest = [preprocessing[key] for key in ("tile_overlap", "tile_whole") if key in preprocessing]
    return Tiling((*preprocessing["tile"],), *rest)


def _sample(image: Any, size: tuple[int, int]) -> Sample:
    """Without objects."""
    boxes, labels, crowd = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
    return Sample(image, boxes, labels, crowd, index=0, original_size=size, size=size)


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")


def chunked(images: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """So many at a time. Raises ValueError, before any is asked for, for no positive number."""
    check_batch_size(batch_size)
    remaining = iter(images)
    return iter(lambda: list(islice(remaining, batch_size)), [])


def listed(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """A single image in a list."""
    is_image = isinstance(images, (str, Path, Image.Image, Sample)) or getattr(images, "ndim", 0) == 3
    single = is_image or not isinstance(images, Iterable)
    return [cast(ImageLike, images)] if single else cast(Iterable[ImageLike], images)


def at_thresholds(detections: Detections, thresholds: Sequence[float]) -> Detections:
    """Those with a score of at least their label's threshold."""
    keep = detections.scores.double() >= torch.tensor(thresholds, dtype=torch.float64)[detections.labels]
    return Detections(*(values[keep] for values in detections))


def find_weights(checkpoint: Path) -> Path:
    """The weights file of a run folder, or the file itself."""
    if not checkpoint.is_dir():
        return checkpoint
    file = checkpoint / "best.safetensors"
    if not file.is_file():
        problem = "has no best.safetensors - give a run that has evaluated at least once, or a weights file"
        raise CheckpointError(f"{checkpoint}: {problem}", code="no-file")
    return file


def check_postprocess(options: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for options that `postprocess` does not take, before any image is read."""
    empty = Predictions((torch.zeros(1, 0, 1),), (torch.zeros(1, 0, 4),), (torch.zeros(0, 4),))
    postprocess(empty, torch.ones(1, 2, dtype=torch.int64), **options)


def as_array(image: object, channels: int = 3) -> UInt8[np.ndarray, "H W C"]:
    """Any `ImageLike` except a path as a uint8 array of so many channels. Raises TypeError for anything else."""
    if isinstance(image, Image.Image) and image.mode[0] not in "IF":  # 16 and 32 bits: PIL's conversion would saturate
        image = np.array(image if channels not in LIKE_RGB else image.convert("RGB"))
        image = as_grey(image) if channels == 1 else image
    array = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape[2:] == (channels,) and array.size:
        return np.ascontiguousarray(array)
    known = f" {image.dtype} {list(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else ""
    expected = f"a uint8 array [H W {channels}], an 8-bit PIL image or a uint8 tensor [{channels} H W]"
    expected += ", in RGB" if channels == 3 else ""
    raise TypeError(f"{type(image).__name__}{known} is no image: give a path, {expected}")
