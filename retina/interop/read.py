"""Checkpoint files of other programs: read without running anything in them, and recognised by the names of their
tensors."""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina.interop import mmdetection, programs, torchvision
from retina.interop.foreign import Foreign, Source, refusal, some
from retina.interop.restricted_pickle import load_arrays
from retina.model.pretrained import read_weights

FOREIGN_SUFFIXES = (".pkl", ".pickle", ".pth", ".pt", ".bin")


FORMATS: list[tuple[set[str], Callable[[Source], Foreign]]] = [
    (torchvision.NAMES, torchvision.read),
    (programs.DETECTRON2, programs.read_detectron2),
    (mmdetection.NAMES, mmdetection.read),
    (programs.YHENON, programs.read_yhenon),
    (programs.TORCHVISION_RESNET, programs.read_torchvision_resnet),
    (programs.DETECTRON2_RESNET, programs.read_detectron2_resnet),
    (programs.CAFFE2_RESNET, programs.read_detectron2_resnet),
]
"""The tensors that a file of this program has, and what reads it."""


def read_foreign(file: Path) -> Foreign:
    """The recognised contents of a `.pkl`, `.pth`, `.pt` or `.safetensors` file.

    Raises CheckpointError for a file that is missing, damaged, of a kind that is not known, or holds anything but
    tensors and plain values, and for weights that are no finite real numbers."""
    source = read_source(file)
    keys = source.state.keys()
    for names, read in FORMATS:
        if names <= keys:
            foreign = read(source)
            _check_numbers(foreign, file)
            return replace(foreign, unused=foreign.unused | dict.fromkeys(source.no_arrays, "no arrays"))
    if "head.classification.predict.weight" in keys:
        raise refusal(file, "is of this program already - use it as it is", code="not-foreign")
    raise refusal(
        file,
        f"not recognised by its tensors ({some(list(keys)) or 'none at all'}) - give a RetinaNet of torchvision, "
        "detectron2, mmdetection or yhenon, or an ImageNet ResNet of torchvision, timm or detectron2",
        code="not-recognised",
        tensors=list(keys),
    )


def _check_numbers(foreign: Foreign, file: Path) -> None:
    for key, value in foreign.state.items():
        name, dtype = foreign.names.get(key, key), str(value.dtype).removeprefix("torch.")
        if not (value.is_floating_point() or key.endswith(".num_batches_tracked")):
            raise refusal(file, f"{name} is {dtype}, which no weights are - give another file", code="wrong-type")
        if not value.float().isfinite().all():
            raise refusal(file, f"{name} is not finite - give weights of a run that went well", code="not-finite")


def read_source(file: Path) -> Source:
    """Tensors, without the `module.` of a DataParallel model or `model.`, and what lies beside them."""
    no_arrays: list[str] = []
    if file.suffix in (".pkl", ".pickle"):
        state, other, no_arrays = _read_pickle(file)
    else:
        with _inert_globals():
            state, other = read_weights(file), {}
            if state.keys() >= mmdetection.NAMES and file.suffix != ".safetensors":
                # `read_weights`, which has just found the file harmless, leaves out what lies beside the weights.
                data = torch.load(file, map_location="cpu", weights_only=True)
                other = {"meta": data["meta"]} if isinstance(data.get("meta"), dict) else {}
    for prefix in ("module.", "model."):  # DataParallel's, and that of DeepForest's first folders
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return Source(file, state, other, no_arrays)


def _read_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """As detectron2 reads them (detectron2/checkpoint/detection_checkpoint.py): weights under `model`, in files
    of Caffe2 under `blobs` or by themselves."""
    if not file.is_file():
        raise refusal(file, "no such file - give an existing .pkl file", code="missing-file")
    try:
        data = load_arrays(file.read_bytes())
    except pickle.UnpicklingError as fault:
        problem = f"no pickle of numpy arrays alone ({fault}) - give another file"
        raise refusal(file, problem, code="unsafe-pickle") from None
    except OSError as fault:
        raise refusal(file, f"cannot be read ({fault.strerror}) - fetch it again", code="unreadable") from None
    data = data if isinstance(data, dict) else {}
    inner = next((data[key] for key in ("model", "blobs") if isinstance(data.get(key), dict)), data)
    state = {key: torch.from_numpy(value) for key, value in inner.items() if isinstance(value, np.ndarray)}
    if not state:
        raise refusal(file, "holds no arrays by name - give another file", code="no-tensors")
    other = {key: value for key, value in data.items() if not isinstance(value, (dict, np.ndarray))}
    return state, other, [key for key in inner if key not in state]


class _Inert:
    """Stands for an object beside the weights, which is neither made nor looked at."""

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _inert_globals() -> AbstractContextManager[None]:
    """Lets `torch.load(weights_only=True)` pass over what trainers save beside the weights: torchvision's references
    their arguments, mmengine its log (HistoryBuffer, with numpy arrays in it)."""
    names = ["argparse.Namespace", "builtins.getattr", "mmengine.logging.history_buffer.HistoryBuffer"]
    names += ["numpy.ndarray", "numpy.dtype", "numpy.dtypes.Float64DType", "numpy.dtypes.Int64DType"]
    names += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    names += [f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")]
    return torch.serialization.safe_globals([(_Inert, name) for name in names])
