"""What a run was made with: versions, commit, command, host and device."""

import json
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision

import retina
from retina.files import read_plain, write_whole
from retina.schema import parse_json


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Plain values. `commit` is that of the checkout the package is imported from, null without one or without git;
    `modified` says whether tracked files differed from it."""
    root = Path(retina.__file__).parents[1]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "retina": retina.__version__,
        "commit": commit,
        "modified": None if changes is None else changes != "",
        "device": f"{device.type} {torch.cuda.get_device_name(device) if on_gpu else platform.machine()}",
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
    }


def record_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Adds a start of the run to the list in `environment.json`. A full disk costs the entry alone, because a run goes
    on without room too."""
    file = folder / "environment.json"
    with suppress(OSError):
        try:
            starts = parse_json(read_plain(file))
        except (FileNotFoundError, FileExistsError, ValueError, RecursionError):
            starts = []
        starts = starts if isinstance(starts, list) else []
        write_whole(file, (json.dumps([*starts, environment], indent=1) + "\n").encode())


def for_weights(environment: dict[str, Any]) -> dict[str, Any]:
    """What may travel with the weights: without the host and the command, which name people and places."""
    return {key: value for key, value in environment.items() if key not in ("host", "command")}


def _git(root: Path, *words: str) -> str | None:
    """What git says, or None. Nothing that the repository's own settings name is run."""
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(root), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
