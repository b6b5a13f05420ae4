from pathlib import Path

import pytest
import torch

from faults import refused
from retina.errors import CheckpointError
from retina.model.pretrained import fetch

URL = "https://download.pytorch.org/models/some_model-0123abcd.pth"


def test_what_is_in_the_cache_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "some_model-0123abcd.pth").touch()
    assert fetch(URL, "R50", "else") == tmp_path / "checkpoints" / "some_model-0123abcd.pth"


def test_without_a_network_one_line_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    with refused("download", "init_from: ", f"put some_model-0123abcd.pth into {folder}, or ", kind=CheckpointError):
        fetch(URL, "R50", "give a file", key="init_from")
