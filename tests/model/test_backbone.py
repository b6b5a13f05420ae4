import functools
import hashlib
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torchvision.ops import FrozenBatchNorm2d

from faults import refused
from retina.errors import CheckpointError, ConfigError
from retina.model.backbone import RESNETS, ResNet
from retina.model.half_resnet import HALVES
from retina.model.pretrained import read_weights
from retina.model.retinanet import retinanet


@pytest.mark.parametrize("name", [*RESNETS, *HALVES])
def test_every_backbone_declares_its_channels_and_strides(name: str) -> None:
    with torch.device("meta"):
        body = ResNet(name, norm="batch", frozen_stages=0)
        features = body(torch.zeros(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == list(body.channels)
    assert [(64 // f.shape[2], 96 // f.shape[3]) for f in features] == [(s, s) for s in body.strides]


@pytest.mark.parametrize("name", HALVES)
def test_a_half_has_the_layers_of_the_whole_with_half_the_channels(name: str) -> None:
    with torch.device("meta"):
        half, whole = (ResNet(n, norm="batch", frozen_stages=0) for n in (name, name.removesuffix("_half")))
    shapes, wholes = (
        [p.shape for n, p in model.named_parameters() if "downsample" not in n] for model in (half, whole)
    )
    assert len(shapes) == len(wholes)
    for small, large in zip(shapes, wholes, strict=True):
        assert list(small) == [n if n in (1, 3, 7) else n // 2 for n in large]
    assert [2 * n for n in half.channels] == list(whole.channels)


def test_a_half_has_no_published_weights_but_takes_a_file(tmp_path: Path) -> None:
    with refused("unknown-value", "weights"):
        retinanet(num_classes=1, backbone="resnet18_half", weights="DEFAULT")
    body = ResNet("resnet18_half", norm="batch", frozen_stages=0)
    save_file(body.state_dict(), tmp_path / "half.safetensors")
    options: dict[str, Any] = {"fpn_channels": 16, "weights": str(tmp_path / "half.safetensors")}
    model = retinanet(num_classes=1, backbone="resnet18_half", **options)
    assert model.backbone.stem.conv1.weight.equal(body.stem.conv1.weight)


def test_maps_equal_torchvisions_body(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    file = tmp_path / "imagenet.pth"
    torch.save(theirs.state_dict(), file)
    ours = ResNet("resnet18", norm="frozen", frozen_stages=0)
    ours.load_imagenet("resnet18", str(file))
    x = torch.randn(1, 3, 64, 64)
    body = torchvision.models._utils.IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in range(1, 5)})
    for mine, expected in zip(ours(x), body(x).values(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)


def test_from_scratch_nothing_is_frozen() -> None:
    model = retinanet(num_classes=2, backbone="resnet18", fpn_channels=16)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())


def test_with_weights_stem_and_first_stage_and_all_statistics_are_frozen(tmp_path: Path) -> None:
    file = tmp_path / "imagenet.safetensors"
    save_file(torchvision.models.resnet18(weights=None).state_dict(), file)
    model = retinanet(num_classes=2, backbone="resnet18", fpn_channels=16, weights=str(file))
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "layer1"}
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_frozen_stages_keep_their_statistics_in_training() -> None:
    body = ResNet("resnet18", norm="batch", frozen_stages=2).train()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    body(torch.randn(2, 3, 64, 64))
    changed = {k.split(".")[0] for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"layer2", "layer3", "layer4"}


def test_a_detector_gives_its_backbone(tmp_path: Path) -> None:
    """Its other tensors and the stages that are not built are left."""
    model = retinanet(num_classes=2, backbone="resnet18", fpn_channels=16)
    file = tmp_path / "detector.safetensors"
    save_file(model.state_dict(), file)
    small = retinanet(num_classes=3, backbone="resnet18", fpn_channels=8, levels=[3, 4], weights=str(file))
    theirs = model.backbone.state_dict()
    own = small.backbone.state_dict()
    assert not any(key.startswith("layer4") for key in own)
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    save_file({f"backbone.{key}": value for key, value in own.items()}, file)
    with refused("other-model", file, "layer4.0.conv1.weight", kind=CheckpointError):
        retinanet(num_classes=3, backbone="resnet18", weights=str(file))


def test_weights_of_another_architecture_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "r34.safetensors"
    save_file(torchvision.models.resnet34(weights=None).state_dict(), file)
    with refused("other-model", file, "layer1.0.", "resnet50", kind=CheckpointError):
        ResNet("resnet50", norm="batch", frozen_stages=0).load_imagenet("resnet50", str(file))


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_norm_eps_is_that_of_every_norm(norm: str) -> None:
    """Against torchvision's own layers with that epsilon; some of ours are frozen."""
    torch.manual_seed(0)
    ours = ResNet("resnet18", norm=norm, frozen_stages=2 if norm == "batch" else 0, norm_eps=0.5).eval()
    kinds = {
        "frozen": FrozenBatchNorm2d,
        "batch": torch.nn.BatchNorm2d,
        "group": lambda channels, **options: torch.nn.GroupNorm(32, channels, **options),
    }
    norm_layer = functools.partial(kinds[norm], eps=0.5)
    theirs = torchvision.models.resnet18(weights=None, norm_layer=norm_layer).eval()
    state = {key.removeprefix("stem."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    body = torchvision.models._utils.IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in range(1, 5)})
    x = torch.randn(1, 3, 64, 64)
    for mine, expected in zip(ours(x), body(x).values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    usual = ResNet("resnet18", norm=norm, frozen_stages=0)
    usual.load_state_dict(ours.state_dict(), strict=False)
    assert not torch.allclose(usual.eval()(x)[0], ours(x)[0], rtol=1e-2)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_stride_in_1x1_moves_the_stride_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    plain = ResNet(name, norm="frozen", frozen_stages=0, last_level=3)
    moved = ResNet(name, norm="frozen", frozen_stages=0, last_level=3, stride_in_1x1=True)
    moved.load_state_dict(plain.state_dict())
    differ = {
        key: (tuple(one.stride), tuple(other.stride))
        for (key, one), (_, other) in zip(plain.named_modules(), moved.named_modules(), strict=True)
        if isinstance(one, torch.nn.Conv2d) and one.stride != other.stride
    }
    assert differ == {"layer2.0.conv1": ((1, 1), (2, 2)), "layer2.0.conv2": ((2, 2), (1, 1))}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(x)[0], moved(x)[0])
    # the first block of C3, convolution by convolution; its norms are identities at the start
    state, c2 = moved.state_dict(), moved(x)[0]
    groups = moved.layer2[0].conv2.groups
    y = F.conv2d(c2, state["layer2.0.conv1.weight"], stride=2).relu()
    y = F.conv2d(y, state["layer2.0.conv2.weight"], padding=1, groups=groups).relu()
    y = F.conv2d(y, state["layer2.0.conv3.weight"]) + F.conv2d(c2, state["layer2.0.downsample.0.weight"], stride=2)
    torch.testing.assert_close(moved.layer2[0](c2), y.relu(), rtol=1e-3, atol=1e-4)


def test_settings_that_a_resnet_cannot_have_are_named() -> None:
    with refused("contradiction", "stride_in_1x1: ", "resnet34"):
        ResNet("resnet34", norm="batch", frozen_stages=0, stride_in_1x1=True)
    for eps in (-1e-5, float("inf"), float("nan")):
        with refused("out-of-range", "norm_eps: "):
            ResNet("resnet18", norm="batch", frozen_stages=0, norm_eps=eps)


def test_unknown_weights_name_lists_the_known() -> None:
    with refused("unknown-value", "weights: ", "'IMAGENET22K'", "DEFAULT, IMAGENET1K_V1", kind=ConfigError):
        ResNet("resnet18", norm="batch", frozen_stages=0).load_imagenet("resnet18", "IMAGENET22K")


def test_failed_download_says_which_file_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with refused("download", "weights: ", "resnet18-f37072fd.pth", tmp_path / "checkpoints", kind=CheckpointError):
        ResNet("resnet18", norm="batch", frozen_stages=0).load_imagenet("resnet18", "IMAGENET1K_V1")


def test_only_plain_tensors_are_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "canary",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    codes = {"evil.pth": "no-state-dict", "list.pth": "no-state-dict"}
    codes |= {"text.safetensors": "unreadable-file", "missing.pth": "no-file"}
    for name, code in codes.items():
        with refused(code, tmp_path / name, kind=CheckpointError):
            read_weights(tmp_path / name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # kinds of tensors that torch itself advises against
@pytest.mark.parametrize(
    "make",
    [
        lambda: {1: torch.ones(1)},
        lambda: {"w": torch.eye(2).to_sparse()},
        lambda: {"w": torch.ones(2, device="meta")},
        lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        lambda: {"w": 1.0},
        lambda: {"state_dict": {"w": [1]}},
        lambda: torch.ones(1),
    ],
)
def test_anything_but_named_dense_tensors_is_refused(make: Callable[[], object], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "odd.pth")
    with refused("no-state-dict", tmp_path / "odd.pth", kind=CheckpointError):
        read_weights(tmp_path / "odd.pth")


def test_archives_that_must_be_unpacked_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        with tarfile.open(tmp_path / "tar.pth", "w") as tar:
            tar.add(tmp_path / "plain.pth", "storages")
    assert len(read_weights(tmp_path / "plain.pth")["w"]) == 10_000
    with refused("no-state-dict", "compressed"):
        read_weights(tmp_path / "packed.pth")
    with refused("no-state-dict", "a tar archive"):
        read_weights(tmp_path / "tar.pth")


def test_what_lies_in_the_cache_is_read_like_any_foreign_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    body = ResNet("resnet18", norm="batch", frozen_stages=0)
    theirs = torchvision.models.resnet18(weights=None).state_dict()

    def publish(content: object) -> None:
        torch.save(content, tmp_path / "new.pth")
        digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()[:8]
        (tmp_path / "new.pth").rename(tmp_path / "checkpoints" / f"resnet18-{digest}.pth")
        entry = torchvision.models.ResNet18_Weights.DEFAULT.value
        monkeypatch.setattr(entry, "url", f"http://localhost/resnet18-{digest}.pth")

    publish(theirs)
    body.load_imagenet("resnet18", "DEFAULT")
    assert torch.equal(body.state_dict()["stem.conv1.weight"], theirs["conv1.weight"])
    publish({"state_dict": Path("x")})
    with refused("no-state-dict", tmp_path / "checkpoints"):
        body.load_imagenet("resnet18", "DEFAULT")


def test_wrapped_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "wrapped.pth")
    assert torch.equal(read_weights(tmp_path / "wrapped.pth")["w"], torch.ones(2))
