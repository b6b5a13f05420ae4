"""Weights that torchvision publishes, from where torchvision itself keeps what it has downloaded."""

import sys
from pathlib import Path
from urllib.error import URLError

import torch

from retina.errors import CheckpointError


def fetch(url: str, what: str, otherwise: str) -> Path:
    """The file behind `url` in torch's cache, downloaded if it is not there.

    what: the setting and its value, to begin an error with. otherwise: what else a user could do.

    Raises CheckpointError naming the file to bring, and where."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        digest = file.stem.rpartition("-")[2]  # the first digits of its SHA-256
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
        except (URLError, OSError, RuntimeError) as fault:
            raise CheckpointError(
                f"{what} could not be downloaded ({fault}) - put {file.name} into {file.parent}, or {otherwise}"
            ) from None
    return file
