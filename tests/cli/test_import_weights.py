import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models import resnet50
from torchvision.models.detection import retinanet_resnet50_fpn

import retina
from commands import Capture, Tool, one_line
from interop.states import body, filled, yhenon
from retina.cli.compose import compose


@pytest.fixture
def import_weights(tool: Tool) -> Tool:
    return partial(tool, "import_weights")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("theirs") / "yhenon.pt"
    flat = {key: value if value.ndim < 4 else torch.zeros(value.shape) for key, value in yhenon(2).items()}
    torch.save(flat, file)
    return file


def words(source: object, output: Path, *more: str) -> list[str]:
    return [f"source={source}", f"output={output}", *more]


def test_an_import_is_ready_for_use(import_weights: Tool, theirs: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "new" / "ours.safetensors"
    (tmp_path / "names.txt").write_text("ant\n\n bee \n")
    assert import_weights(*words(theirs, output, f"classes={tmp_path / 'names.txt'}", "conventions.short_side=64")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("recognised: yhenon's pytorch-retinanet, ")
    tune = lines[-2].removeprefix("fine-tune: python tools/train.py ")
    assert tune.startswith(f"experiment=paper data=coco data.root=DIR init_from={output} model.backbone=resnet18 ")
    assert "model.anchor_offset=0.5" in lines[-2]
    assert "model.num_classes" not in lines[-2]
    assert lines[-1] == f"written: {output}"
    detector = retina.load(output)
    assert detector.classes == ("ant", "bee")
    composed = compose("train", shlex.split(tune))["model"]
    assert composed == {key: detector.card.model.get(key, value) for key, value in composed.items()}
    assert detector.card.preprocessing["short_side"] == 64
    (found,) = detector.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert len(found.scores) > 0


def test_an_output_is_replaced_only_if_asked(
    import_weights: Tool, theirs: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "ours.safetensors"
    output.write_text("mine")
    assert import_weights(*words(theirs, output)) == 2
    assert "is there already - give another name, or overwrite=true" in one_line(capsys)
    assert output.read_text() == "mine"
    assert import_weights(*words(theirs, output, "overwrite=true")) == 0
    assert retina.load(output).classes == ("class 0", "class 1")
    before = output.read_bytes()
    capsys.readouterr()
    assert import_weights(*words(tmp_path / "none.pth", output, "overwrite=true")) == 2
    assert "no such file" in one_line(capsys)
    assert output.read_bytes() == before


def test_a_backbone_becomes_a_file_for_model_weights(import_weights: Tool, tmp_path: Path, capsys: Capture) -> None:
    save_file(
        {key: value.contiguous() for key, value in filled(body("resnet18")).items()}, tmp_path / "r18.safetensors"
    )
    output = tmp_path / "backbone.safetensors"
    assert import_weights(*words(tmp_path / "r18.safetensors", output)) == 0
    told = capsys.readouterr().out.splitlines()[-2]
    assert told == f"train with it: python tools/train.py model.backbone=resnet18 model.weights={output}"
    assert load_file(output).keys() == body("resnet18").keys()
    for word in ("classes=[a,b]", "conventions.score_threshold=0.5"):
        assert import_weights(*words(tmp_path / "r18.safetensors", output, "overwrite=true", word)) == 2
        assert "r18.safetensors, a plain backbone - leave" in one_line(capsys)
    mean = "conventions.mean=[1,2,3]"
    assert import_weights(*words(tmp_path / "r18.safetensors", output, "overwrite=true", mean)) == 0
    assert "model.mean=[1.0,2.0,3.0]" in capsys.readouterr().out


def test_ours_is_written_as_torchvision_s(import_weights: Tool, tmp_path: Path, capsys: Capture) -> None:
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert import_weights(*words(tmp_path / "theirs.pth", ours, "classes=[ant,bee]")) == 0
    capsys.readouterr()
    assert import_weights(*words(ours, back, "to=torchvision")) == 0
    assert f"load_file({str(back)!r})" in capsys.readouterr().out
    theirs.load_state_dict(load_file(back))
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    with safe_open(back, framework="pt") as handle:
        assert json.loads(handle.metadata()["classes"]) == ["ant", "bee"]
    assert not torch.equal(theirs.backbone.body.conv1.weight, resnet50(weights=None).conv1.weight)


def test_what_torchvision_has_not_is_not_written(
    import_weights: Tool, theirs: Path, tmp_path: Path, capsys: Capture
) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert import_weights(*words(theirs, ours)) == 0
    capsys.readouterr()
    assert import_weights(*words(ours, back, "to=torchvision")) == 2
    assert "model.anchor_offset: 0.5" in one_line(capsys)
    assert not back.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["to=onnx"], "to: 'onnx' is not known - choose one of retina, torchvision"),
        (["to=torchvision", "classes=[a]"], "classes: is for weights of others, not for to=torchvision"),
        (["to=torchvision", "conventions.bgr=false"], "conventions.bgr: is for weights of others"),
        (["to=torchvision", "ignore_unknown=true"], "ignore_unknown: is for weights of others"),
        (["output=x.pth"], "output: x.pth - give a name that ends in .safetensors"),
        (["classes=[1,2]"], "classes: [1, 2] is of the wrong type - give list[str] or str"),
        (["classes=none.txt"], "none.txt: No such file"),
        (["classes=[a,b,c]"], "classes: 3 names for 2 classes"),
        (["conventions.bgr=3"], "conventions.bgr: 3 is of the wrong type"),
        (["conventions.eps=3"], "conventions.eps: no such key"),
        (["conventions.score_threshold=1.0"], "conventions: score_threshold must be in [0, 1)"),
        (
            ["source=torchvision:resnet50"],
            "torchvision:resnet50: not known - choose torchvision:retinanet_resnet50_fpn",
        ),
        (["conventions.anchor_sizes=[1e400,1,1,1,1]"], "conventions.anchor_sizes: [inf, 1.0"),
        (["conventions.anchor_ratios=[0,1,2]"], "conventions.anchor_ratios: [0.0, 1.0, 2.0] is not allowed"),
        (["conventions.mean=[-1,0,0]"], "conventions.mean: [-1.0, 0.0, 0.0] is not allowed - give 3 numbers from 0"),
        (["conventions.short_side=2000"], "conventions.short_side: 2000 is not allowed - give at most the long side"),
        (["classes=[a,'']"], "classes: no list of names"),
        (["conventions.anchor_scales=[1.0]"], "predicts 9 boxes per cell"),
        (["conventions.stride_in_1x1=true"], "stride_in_1x1: resnet18 has no bottlenecks"),
    ],
)
def test_mistakes_are_one_line(
    import_weights: Tool, theirs: Path, tmp_path: Path, capsys: Capture, changes: list[str], said: str
) -> None:
    output = tmp_path / "ours.safetensors"
    assert import_weights(*words(theirs, output), *changes) == 2
    assert said in one_line(capsys)
    assert not output.exists()
