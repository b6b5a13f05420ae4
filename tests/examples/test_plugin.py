"""A package of one's own is installed, trained and evaluated; without `plugins` nothing of it is imported."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import retina
from commands import Capture, Tool, one_line
from faults import refused
from retina.model.parts import make_part
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard, save_detector
from tiny import PREPROCESSING

ROOT = Path(__file__).parents[2]
COMMANDS = [
    shlex.split(line)[1:] for line in re.findall(r"^retina .*$", (ROOT / "docs/plugins.md").read_text(), re.MULTILINE)
]
TINYNET = {"_target_": "mylab.parts.TinyNet", "width": 8}


@pytest.fixture(scope="module")
def mylab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example package, built and installed where Python finds it."""
    source = shutil.copytree(ROOT / "examples" / "plugin", tmp_path_factory.mktemp("plugin") / "source")
    target = source.parent / "installed"
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    sys.path.insert(0, str(target))
    yield target
    sys.path.remove(str(target))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def test_the_documented_commands(
    mylab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    train, evaluate, infer = COMMANDS
    assert tool(*train, "train.length=2", "train.eval_every=2", "train.device=cpu", "train.pictures=0") == 0
    capsys.readouterr()
    assert tool(*[word for word in evaluate if "plugins" not in word], "device=cpu") == 2
    line = one_line(capsys)
    assert "its backbone is mylab.parts.TinyNet" in line
    assert "plugins=[mylab]" in line
    assert tool(*evaluate, "device=cpu") == 0
    assert tool(*infer, "device=cpu") == 0
    detector = retina.load("runs/mylab", device="cpu", plugins=["mylab"])
    assert type(detector.model.backbone).__module__ == "mylab.parts"


def test_a_wrong_argument_of_an_own_part_is_named_before_data_is_made(
    mylab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=smoke", "train.device=cpu"]
    assert tool("train", *words, "plugins=[mylab]", "model.backbone={_target_: mylab.parts.TinyNet, widht: 8}") == 2
    assert "model.backbone.widht" in one_line(capsys)
    assert tool("train", *words, "model.backbone={_target_: mylab.parts.TinyNet}") == 2
    line = one_line(capsys)
    assert "model.backbone: mylab.parts.TinyNet is not allowed" in line
    assert "plugins=[mylab]" in line
    assert list(tmp_path.iterdir()) == []


def test_a_weights_file_imports_nothing_by_itself(mylab: Path, tmp_path: Path) -> None:
    model = retinanet(num_classes=1, backbone=TINYNET, levels=[3, 4], fpn_channels=8, head_convs=0, plugins=["mylab"])
    assert model.arguments["backbone"] == TINYNET
    assert "plugins" not in model.arguments
    arguments = model.arguments | {"plugins": ["mylab"]}  # as an attacker would write it
    card = DetectorCard(model=arguments, classes=["a"], category_ids=[1], preprocessing=PREPROCESSING, postprocess={})
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]
    with refused("needs-plugin", file, "mylab.parts.TinyNet"):
        retina.load(file, device="cpu")
    assert "mylab" not in sys.modules
    loaded = retina.load(file, device="cpu", plugins=["mylab"]).model
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert [level.shape for level in loaded(image).logits] == [level.shape for level in model(image).logits]


def test_every_command_that_loads_weights_takes_plugins(
    mylab: Path, tiny_data: Path, tmp_path: Path, tool: Tool, capsys: Capture
) -> None:
    parts = {"backbone": TINYNET, "levels": [3, 4], "fpn_channels": 8, "head_convs": 0, "plugins": ["mylab"]}
    model = retinanet(num_classes=5, **parts)
    classes = {"circle": 3, "rectangle": 7, "triangle": 11, "star": 20, "ring": 42}
    lists = {"classes": list(classes), "category_ids": list(classes.values())}
    card = DetectorCard(model=model.arguments, **lists, preprocessing=PREPROCESSING, postprocess={})
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    data = ["data=coco", f"data.root={tiny_data}", f"checkpoint={file}", "device=cpu"]
    for name, words, code in (
        ("infer", [f"checkpoint={file}", f"source={tiny_data}/val", f"output={tmp_path}/out", "device=cpu"], None),
        ("eval", [*data, f"output={tmp_path}/eval"], None),
        ("lab", ["distribution", *data, f"output={tmp_path}/lab"], None),
        (
            "import_weights",
            [f"source={file}", f"output={tmp_path}/x.safetensors", "to=torchvision"],
            "not-in-torchvision",
        ),
    ):
        assert tool(name, *words) == 2
        assert "error[needs-plugin]" in capsys.readouterr().err, name
        assert tool(name, *words, "plugins=[mylab]") == (2 if code else 0)
        assert not code or f"error[{code}]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "levels", "code"),
    [
        ({"_target_": "mylab.parts.log_cosh"}, [3, 4], "wrong-type"),
        ({"_target_": "mylab.parts.TinyNt"}, [3, 4], "unknown-target"),
        ({"_target_": "torch.nn.Linear"}, [3, 4], "not-allowed"),
        ({"width": 8}, [3, 4], "missing"),
        (TINYNET | {"depth": 3}, [3, 4], "wrong-value"),
    ],
)
def test_what_is_no_backbone(mylab: Path, section: dict[str, object], levels: list[int], code: str) -> None:
    with refused(code, "backbone"):
        retinanet(num_classes=1, backbone=section, levels=levels, plugins=["mylab"])


def test_an_own_neck_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownparts.py").write_text(
        "from torch import nn\n"
        "from retina.model.fpn import FPN\nfrom retina.model.head import Head\n"
        "class Neck(FPN):\n    pass\n"
        "class Small(Head):\n"
        "    def __init__(self, in_channels, *, num_classes, num_anchors, width):\n"
        "        super().__init__(in_channels, num_classes=num_classes, num_anchors=num_anchors, channels=width,\n"
        "                         num_convs=1, norm=None, prior=0.01)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = {"neck": {"_target_": "ownparts.Neck"}, "head": {"_target_": "ownparts.Small", "width": 4}}
    model = retinanet(num_classes=2, backbone="resnet18", fpn_channels=8, plugins=["ownparts"], **parts)
    assert (type(model.fpn).__name__, type(model.head).__name__) == ("Neck", "Small")
    assert {key: model.arguments[key] for key in parts} == parts
    assert len(model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).logits) == 5


def test_plugins_are_names_of_packages() -> None:
    for plugins in ("mylab", ["my-lab"], [""]):
        with refused("wrong-type", "plugins"):
            make_part({"_target_": "mylab.parts.TinyNet"}, "backbone", plugins)
