import argparse
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from faults import refused
from interop.states import body, detectron2, filled, mmdetection, yhenon
from retina.errors import CheckpointError
from retina.interop.convert import convert_detector
from retina.interop.read import read_foreign, read_source
from retina.model.pretrained import read_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))
import hostile

RESNET = filled(body("resnet18"))


@pytest.mark.parametrize(
    ("make", "program"),
    [
        (lambda: detectron2(3), "detectron2's RetinaNet"),
        (lambda: mmdetection(3), "mmdetection's RetinaNet"),
        (lambda: yhenon(3), "yhenon's pytorch-retinanet"),
        (lambda: RESNET, "an ImageNet ResNet (torchvision, timm)"),
    ],
)
def test_programs_are_recognised_by_names(make: Callable[[], dict[str, Tensor]], program: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "theirs.pth")
    foreign = read_foreign(tmp_path / "theirs.pth")
    assert foreign.program == program
    assert foreign.unknown == []
    assert foreign.is_detector is ("ResNet " not in program)


def test_what_is_of_no_program_is_one_line(tmp_path: Path) -> None:
    for name, state in {"odd": {"a.b": torch.zeros(1), "c": torch.zeros(2)}, "empty": {}}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with refused("not-recognised", f"{name}.safetensors", kind=CheckpointError):
            read_foreign(tmp_path / f"{name}.safetensors")
    save_file({"head.classification.predict.weight": torch.zeros(1)}, tmp_path / "ours.safetensors")
    with refused("not-foreign", "ours.safetensors", kind=CheckpointError):
        read_foreign(tmp_path / "ours.safetensors")


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("none.pkl", "none.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match=r"no such file"):
            read_source(tmp_path / name)
    for name in ("cut.pkl", "cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02}q")
        with pytest.raises(CheckpointError, match=rf"^[^\n]*{name}: [^\n]* - [^\n]*$"):
            read_source(tmp_path / name)
    for data in ([1, 2], {}, {"model": {"a": 3}}, 7, "text"):
        (tmp_path / "odd.pkl").write_bytes(pickle.dumps(data))
        with refused("no-tensors", "odd.pkl", kind=CheckpointError):
            read_source(tmp_path / "odd.pkl")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of pickles in protocol 4
def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    for name, opcodes in hostile.payloads(tmp_path).items():
        for suffix in (".pkl", ".pth"):
            file = tmp_path / f"{name.replace('/', '_')}{suffix}"
            file.write_bytes(hostile.as_pickle(opcodes))
            with pytest.raises(CheckpointError, match=r"^[^\n]*$"):
                read_foreign(file)
            file.unlink()
    assert list(tmp_path.iterdir()) == []


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_what_lies_beside_the_weights_is_passed_over_only_if_it_is_known(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=0.1, more=[1]), "losses": np.arange(3.0), "last": np.float64(3)}
    torch.save({"model": RESNET, **beside}, tmp_path / "known.pth")
    assert read_foreign(tmp_path / "known.pth").program.startswith("an ImageNet ResNet")
    torch.save({"model": RESNET, "args": argparse.Namespace(x=Touch(tmp_path / "canary"))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_foreign(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "known.pth")  # elsewhere nothing has become allowed


def test_the_prefix_of_a_parallel_model_is_taken_off(tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in RESNET.items()}}, tmp_path / "ddp.pth")
    assert read_source(tmp_path / "ddp.pth").state.keys() == RESNET.keys()


def test_detectron_s_blobs_and_bare_pickles_are_read(tmp_path: Path) -> None:
    arrays = {"conv1_w": np.ones(3, np.float32), "conv1_w_momentum": np.zeros(3, np.float32), "lr": 0.1}
    for name, data in {"blobs": {"blobs": arrays, "cfg": "text"}, "bare": arrays}.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(data, 2))
        source = read_source(tmp_path / f"{name}.pkl")
        assert source.state["conv1_w"].tolist() == [1.0, 1.0, 1.0]
        assert source.state.keys() == {"conv1_w", "conv1_w_momentum"}
        assert source.no_arrays == ["lr"]


def test_what_is_no_array_among_the_weights_is_listed(tmp_path: Path) -> None:
    arrays = {key: value.half().numpy() for key, value in detectron2(3).items()}
    more = {"head.scale": 3.0, "mask_head": {"weight": np.zeros(3)}}
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps({"model": arrays | more, "__author__": "x"}))
    assert "left out, no arrays: head.scale, mask_head" in convert_detector(read_foreign(file), file).notes


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor([1.0, float("nan")]), "is not finite"),
        (torch.tensor([float("inf"), 1.0]).half(), "is not finite"),
        (torch.ones(2, dtype=torch.complex64), "is complex64, which no weights are"),
        (torch.ones(2, dtype=torch.int64), "is int64, which no weights are"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_their_own_names(
    value: Tensor, said: str, tmp_path: Path
) -> None:
    torch.save(yhenon(3) | {"fpn.P6.bias": value}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=rf"^[^\n]*theirs\.pth: fpn\.P6\.bias {said}[^\n]* - [^\n]*$"):
        read_foreign(tmp_path / "theirs.pth")


def test_tensors_of_stride_0_are_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(1000, 1000, 1000, 8)}, tmp_path / "bomb.pth")
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with refused("too-large", tmp_path / "bomb.pth"):
        read_source(tmp_path / "bomb.pth")
