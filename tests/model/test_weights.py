import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import refused
from interop.states import yhenon
from retina.errors import CheckpointError, ConfigError
from retina.interop.transfer import init_from
from retina.model.retinanet import RetinaNet, retinanet
from retina.model.weights import DetectorCard, load_detector, read_card, save_detector

CPU = torch.device("cpu")


@pytest.fixture
def model() -> RetinaNet:
    torch.manual_seed(0)
    return retinanet(num_classes=2, backbone="resnet18", fpn_channels=16, head_convs=1).eval()


@pytest.fixture
def card(model: RetinaNet) -> DetectorCard:
    return DetectorCard(
        model=model.arguments,
        classes=["cat", "dog"],
        category_ids=[7, 3],
        preprocessing={"short_side": 64},
        postprocess={},
    )


def test_a_saved_detector_comes_back_the_same(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    save_detector(tmp_path / "best.safetensors", model.state_dict(), card)
    again, read = load_detector(tmp_path / "best.safetensors", CPU)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(torch.cat(again(images).logits, 1), torch.cat(model(images).logits, 1))
    assert read == card
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_weights_of_another_architecture_are_named(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), replace(card, model=card.model | {"fpn_channels": 32}))
    with refused("other-model", f"{file}: fpn", kind=CheckpointError):
        load_detector(file, CPU)
    save_detector(file, model.state_dict(), replace(card, model=card.model | {"backbone": "resnet34"}))
    with refused("other-model", file, "backbone"):
        load_detector(file, CPU)


def test_unusable_files_are_one_line(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "w.safetensors"
    with refused("no-file", file):
        read_card(file)
    save_file(model.state_dict(), file)
    with refused("no-card", file):
        read_card(file)
    save_detector(file, model.state_dict(), replace(card, schema_version=99))
    with refused("other-version", file, "99"):
        read_card(file)
    save_file(load_file(file), file, metadata={"retina": json.dumps({"schema_version": 1})})
    with refused("bad-header", file, "model"):
        read_card(file)
    file.write_bytes(b"\x00" * 100)
    with refused("unreadable-file", file):
        read_card(file)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A weights file of a few kB."""
    card = DetectorCard(
        model={"num_classes": 2}, classes=["cat", "0" * 64], category_ids=[7, 3], preprocessing={}, postprocess={}
    )
    save_detector(tmp_path / "small.safetensors", {"weight": torch.arange(300.0)}, card)
    return tmp_path / "small.safetensors"


def test_every_flipped_bit_and_every_cut_is_noticed(small: Path) -> None:
    whole = small.read_bytes()
    assert read_card(small).classes == ["cat", "0" * 64]
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    positions = [*range(header), *(generator.randrange(header, len(whole)) for _ in range(200))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.randrange(8)
        small.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"^[^\n]*small\.safetensors: [^\n]* - [^\n]*$"):
            read_card(small)
    for position in (0, 7, header - 1, header, len(whole) - 1):
        small.write_bytes(whole[:position])
        with refused("unreadable-file", small, kind=CheckpointError):
            read_card(small)


def test_a_flipped_bit_is_noticed_when_weights_are_loaded(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    damaged = bytearray(file.read_bytes())
    damaged[-1000] ^= 1
    file.write_bytes(damaged)
    for use in (lambda: load_detector(file, CPU), lambda: init_from(model, file, classes=card.classes)):
        with refused("damaged-file", file):
            use()


def test_the_same_weights_are_the_same_bytes(tmp_path: Path, small: Path) -> None:
    save_detector(tmp_path / "again", {"weight": torch.arange(300.0)}, read_card(small))
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


@pytest.mark.parametrize("changes", [{"model": 3}, {"classes": "cat"}, {"step": "1"}, {"metrics": None}])
def test_headers_of_another_shape_are_one_line(tmp_path: Path, card: DetectorCard, changes: dict[str, object]) -> None:
    values = {"model": {}, "classes": [], "category_ids": [], "preprocessing": {}, "postprocess": {}, "step": 0}
    values |= {"metrics": {}, "schema_version": 1} | changes
    for text in (json.dumps(values), "[]", "null", "[" * 100_000, "{}"):
        save_file({"weight": torch.zeros(1)}, tmp_path / "w", metadata={"retina": text})
        with pytest.raises(CheckpointError, match=r"^[^\n]* - [^\n]*$"):
            read_card(tmp_path / "w")


def test_the_names_of_earlier_versions_are_understood(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    settings = dict(card.model)
    settings["anchors_spread"] = not settings.pop("canvas_strides")
    old = replace(card, model=settings, preprocessing={"short_side": 64, "divisor": 96})
    save_detector(tmp_path / "w.safetensors", model.state_dict(), old)
    loaded, read = load_detector(tmp_path / "w.safetensors", CPU)
    assert read.preprocessing == {"short_side": 64, "pad_multiple": 96}
    assert loaded.arguments["canvas_strides"]


def test_a_file_cannot_have_others_loaded(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    card = replace(card, model=card.model | {"weights": str(tmp_path / "evil.pth")})
    save_detector(tmp_path / "w.safetensors", model.state_dict(), card)
    assert load_detector(tmp_path / "w.safetensors", CPU)[0].arguments["weights"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, card: DetectorCard, value: float) -> None:
    state = {"count": torch.tensor(3), "good": torch.zeros(4), "bad": torch.zeros(4, dtype=torch.float16)}
    save_detector(tmp_path / "w", state, card)
    before = (tmp_path / "w").read_bytes()
    state["bad"][2] = value
    with refused("not-finite", tmp_path / "w", "bad", kind=CheckpointError):
        save_detector(tmp_path / "w", state, card)
    assert (tmp_path / "w").read_bytes() == before


def another(num_classes: int = 2, **changes: object) -> RetinaNet:
    torch.manual_seed(1)
    return retinanet(
        **{"num_classes": num_classes, "backbone": "resnet18", "fpn_channels": 16, "head_convs": 1} | changes
    )


def test_a_run_starts_from_another_of_the_same_classes(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "run" / "best.safetensors"
    file.parent.mkdir()
    save_detector(file, model.state_dict(), card)
    for source in (file, file.parent):
        new = another()
        count = len(model.state_dict())
        lines = init_from(new, source, classes=["cat", "dog"])
        assert lines == [f"init_from: {count} of {count} tensors are those of {file}"]
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in new.state_dict().items())


@pytest.mark.parametrize("classes", [["ant", "bee"], ["Cat", "Dog", "cow"], ["ant"]])
def test_other_classes_start_anew_with_the_prior_bias(
    tmp_path: Path, model: RetinaNet, card: DetectorCard, classes: list[str]
) -> None:
    file = tmp_path / "best.safetensors"
    with torch.no_grad():
        model.head.classification.predict.bias.fill_(3.0)
    save_detector(file, model.state_dict(), card)
    new = another(len(classes), prior=0.02)
    start = {key: value.clone() for key, value in new.state_dict().items()}
    lines = init_from(new, file, classes=classes)
    assert lines[1:] == [
        "model: 2 tensors start anew: head.classification.predict.weight (other classes), "
        "head.classification.predict.bias (other classes)"
    ]
    for key, value in new.state_dict().items():
        source = start if key.startswith("head.classification.predict.") else model.state_dict()
        assert torch.equal(value, source[key]), key
    torch.testing.assert_close(new.head.classification.predict.bias.sigmoid(), torch.full([9 * len(classes)], 0.02))


@pytest.mark.parametrize("classes", [["dog", "cat"], ["cow", "cat", "ant", "dog"], ["dog"]])
def test_classes_of_the_same_name_keep_their_rows(
    tmp_path: Path, model: RetinaNet, card: DetectorCard, classes: list[str]
) -> None:
    file = tmp_path / "best.safetensors"
    with torch.no_grad():
        model.head.classification.predict.bias.copy_(torch.arange(18.0))
    save_detector(file, model.state_dict(), card)
    new = another(len(classes), prior=0.02)
    lines = init_from(new, file, classes=classes)
    kept = [name for name in classes if name in card.classes]
    others = [name for name in classes if name not in card.classes]
    assert f"classes: {len(kept)} keep what they have learned: " in lines[1]
    assert lines[2:] == ([f"classes: 2 start anew with the prior bias: {', '.join(others)}"] if others else [])
    bias = new.head.classification.predict.bias.detach().view(9, len(classes))
    weight = new.head.classification.predict.weight.view(9, len(classes), -1)
    old = model.head.classification.predict.weight.view(9, 2, -1)
    for k, name in enumerate(classes):
        if name in others:
            torch.testing.assert_close(bias[:, k].sigmoid(), torch.full([9], 0.02))
        else:
            assert bias[:, k].tolist() == [2.0 * n + card.classes.index(name) for n in range(9)]
            assert torch.equal(weight[:, k], old[:, card.classes.index(name)])


def test_a_class_can_be_called_otherwise(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    new = another(2)
    lines = init_from(new, file, classes=["hound", "dog"], remap={"dog": "hound"})
    assert lines[1:3] == [
        "classes: 1 keep what they have learned: hound (dog there)",
        "classes: 1 start anew with the prior bias: dog",
    ]
    ours, theirs = (m.head.classification.predict.weight.view(9, 2, -1) for m in (new, model))
    assert torch.equal(ours[:, 0], theirs[:, 1])
    swapped = another(2)
    lines = init_from(swapped, file, classes=["cat", "dog"], remap={"dog": "cat", "cat": "dog"})
    assert lines[1] == "classes: 2 keep what they have learned: dog (cat there), cat (dog there)"
    with pytest.raises(ConfigError, match="'cow' is no class of the weights"):
        init_from(new, file, classes=["cat"], remap={"cow": "cat"})


def test_other_numbers_of_anchors_start_anew(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    lines = init_from(another(3, anchor_scales=[1.0]), file, classes=["dog", "cat", "cow"])
    assert "head.classification.predict.bias ([18] there for 2 classes, [9] here)" in "".join(lines)
    assert not any(line.startswith("classes:") for line in lines)


def test_settings_that_no_tensor_tells_are_named(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    lines = init_from(another(2, std=[1.0, 1.0, 1.0], norm_eps=1e-3), file, classes=["cat", "dog"])
    assert lines[-1].endswith("to go on with those give model.norm_eps=1e-05 model.std=[58.395,57.12,57.375]")


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({"levels": [2, 3, 4, 5, 6]}, r"fpn\.(lateral|output)\."),
        ({"norm": "group"}, r"backbone\..*(bn\d|downsample\.1)\."),
        ({"p6_from": "p5"}, r"fpn\.extra\."),
        ({"head_convs": 2}, r"head\.\w+\.(predict|convs\.2)\."),
        ({"head_norm": "group"}, r"head\.\w+\.convs\.1\."),
        ({"box_bins": 4, "anchor_scales": [1.0], "anchor_ratios": [1.0]}, r"head\.(box|classification)\.predict\."),
        ({"backbone": "resnet34"}, r"backbone\."),
    ],
)
def test_other_layers_of_the_same_names_start_anew(
    tmp_path: Path, card: DetectorCard, changes: dict[str, Any], own: str
) -> None:
    channels = 512 if "p6_from" in changes else 32  # P6 of C5 and of P5 have tensors of one shape only with those of C5
    common: dict[str, Any] = {"num_classes": 2, "backbone": "resnet18", "head_convs": 1, "fpn_channels": channels}
    if "box_bins" in changes:
        common |= {"anchor_scales": [1.0, 2.0], "anchor_ratios": [1.0, 2.0]}
    old, new = retinanet(**common), retinanet(**common | changes)
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter)
    state = {key: value.clone() for key, value in new.state_dict().items()}
    save_detector(tmp_path / "w.safetensors", old.state_dict(), replace(card, model=old.arguments))
    lines = init_from(new, tmp_path / "w.safetensors", classes=card.classes)
    for key, value in new.state_dict().items():
        kept = re.match(own, key) or key not in old.state_dict()
        assert torch.equal(value, state[key] if kept else old.state_dict()[key]), key
    (name, value), *_ = changes.items()
    if name != "head_norm":
        assert f"(model.{name} is {old.arguments[name]} there)" in "".join(lines)
    assert f"model.{name}=" in lines[-1]


def test_convolutions_of_the_head_are_renumbered_where_one_has_norms(tmp_path: Path, card: DetectorCard) -> None:
    common: dict[str, Any] = {"num_classes": 2, "backbone": "resnet18", "head_convs": 2, "fpn_channels": 8}
    plain, normed = retinanet(**common), retinanet(**common, head_norm="group")
    card = DetectorCard(
        model=plain.arguments, classes=["a", "b"], category_ids=[1, 2], preprocessing={}, postprocess={}
    )
    save_detector(tmp_path / "plain", plain.state_dict(), card)
    save_detector(tmp_path / "normed", normed.state_dict(), replace(card, model=normed.arguments))
    new = retinanet(**common, head_norm="group")
    init_from(new, tmp_path / "plain", classes=["a", "b"])
    assert torch.equal(new.head.box.convs[3].weight, plain.head.box.convs[2].weight)
    new = retinanet(**common)
    lines = init_from(new, tmp_path / "normed", classes=["a", "b"])
    assert torch.equal(new.head.box.convs[2].weight, normed.head.box.convs[3].weight)
    assert new.head.box.convs[2].bias.eq(0).all()
    assert "init_from: 8 tensors of the file have no use here" in "".join(lines)


def test_a_detector_of_another_program_is_imported_on_the_way(tmp_path: Path) -> None:
    theirs = yhenon(3)
    torch.save(theirs, tmp_path / "yhenon.pt")
    new = retinanet(num_classes=2, backbone="resnet18", fpn_channels=8, norm="frozen", anchor_offset=0.5)
    lines = init_from(new, tmp_path / "yhenon.pt", classes=["class 2", "bee"])
    assert lines[0].startswith("recognised: yhenon's pytorch-retinanet")
    assert "classes: 1 keep what they have learned: class 2" in lines
    expected = theirs["classificationModel.conv1.weight"]
    assert torch.equal(new.head.classification.convs[0].weight, expected)
    backbone = {key: value for key, value in theirs.items() if key.startswith(("conv1", "bn1", "layer"))}
    torch.save(backbone, tmp_path / "backbone.pt")
    with pytest.raises(CheckpointError, match="which detects nothing"):
        init_from(new, tmp_path / "backbone.pt", classes=["bee"])


def test_torchvision_s_weights_are_taken_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    new = another(1)
    with pytest.raises(
        CheckpointError, match=r"^torchvision:[^\n]*put retinanet_resnet50_fpn_v2_coco-5905b1c5\.pth into"
    ):
        init_from(new, "torchvision:retinanet_resnet50_fpn_v2", classes=["x"])
    with pytest.raises(ConfigError, match="not known - choose torchvision:retinanet_resnet50_fpn or"):
        init_from(new, "torchvision:resnet50", classes=["x"])
    torch.save(yhenon(3), tmp_path / "checkpoints" / "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth")
    with refused("wrong-hash", "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", kind=CheckpointError):
        init_from(new, "torchvision:retinanet_resnet50_fpn_v2", classes=["x"])


def test_bare_weights_and_other_shapes_are_listed(tmp_path: Path, model: RetinaNet) -> None:
    state = model.state_dict() | {"mask.weight": torch.zeros(1)}
    del state["backbone.stem.conv1.weight"]
    (tmp_path / "step_00000001").mkdir()
    save_file(state, tmp_path / "step_00000001" / "model.safetensors")
    lines = init_from(another(head_convs=1, fpn_channels=32), tmp_path / "step_00000001", classes=["cat", "dog"])
    assert lines[0].startswith("init_from: ")
    assert "backbone.stem.conv1.weight (not in the file), fpn." in lines[1]
    assert "here) and " in lines[1]
    assert lines[2] == "init_from: 1 tensors of the file have no use here: mask.weight"
    lines = init_from(another(), tmp_path / "step_00000001", classes=["cat", "dog"])
    assert "head.classification.predict.bias (the file names no classes)" in lines[1]


def test_weights_that_are_of_no_use_are_refused(tmp_path: Path, model: RetinaNet) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"run/best\.safetensors: no such file"):
        init_from(model, tmp_path / "run", classes=[])
    save_file({"weight": torch.zeros(1)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match="holds nothing that fits this model"):
        init_from(model, tmp_path / "w", classes=[])
    save_file(model.state_dict() | {"fpn.lateral.0.weight": torch.full((16, 128, 1, 1), math.nan)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"fpn\.lateral\.0\.weight is not finite"):
        init_from(model, tmp_path / "w", classes=[])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
