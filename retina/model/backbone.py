"""Bottom-up networks: torchvision's ResNets as a source of the maps C2..C5 with declared strides and channels."""

import math
import sys
import tarfile
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from retina.errors import CheckpointError, ConfigError, check_choice
from retina.model.content import Content, GroupNorm
from retina.ops.norm import normalize_content

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


class ResNet(nn.Module):
    """The stages of a torchvision ResNet. Returns C2, C3, C4, C5 at strides 4, 8, 16, 32, finest first.

    With `last_level` below 5, the stages above C_`last_level` are left out, because nothing would use them."""

    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(
        self,
        name: str,
        *,
        norm: str,
        frozen_stages: int,
        last_level: int = 5,
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
    ) -> None:
        """`frozen_stages` counts from the input: 1 is the stem, 2 adds C2's stage, up to 5. Parameters of frozen stages
        need no gradient and their BatchNorm keeps its statistics. `stride_in_1x1`: a bottleneck that halves the map
        does so in its first convolution (He et al., CVPR 2016, and weights made for Caffe), not in its 3x3 one.

        Raises ConfigError for values that are not known, out of range or contradict each other."""
        super().__init__()
        check_choice(name, RESNETS, "backbone")
        check_choice(norm, ("batch", "frozen", "group"), "norm")
        check_frozen_stages(frozen_stages)
        if not 0 <= norm_eps < math.inf:
            raise ConfigError(f"{norm_eps} - give a small number, e.g. 1e-5", code="out-of-range", key="norm_eps")
        layers: dict[str, Any] = {
            "batch": FoldedBatchNorm2d,
            "frozen": FoldedFrozenBatchNorm2d,
            "group": partial(GroupNorm, 32),
        }
        net = torchvision.models.get_model(name, weights=None, norm_layer=partial(layers[norm], eps=norm_eps))
        if stride_in_1x1:
            _move_strides(net, name)
        self.stem = nn.Sequential()
        for layer in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(layer, getattr(net, layer))
        for i in range(1, last_level):
            self.add_module(f"layer{i}", getattr(net, f"layer{i}"))
        self.strides = self.strides[: last_level - 1]
        self.channels = tuple(16 * stride * net.layer1[0].expansion for stride in self.strides)
        for stage in self.stages[:frozen_stages]:
            _freeze(stage)
        fold_norms(self)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return tuple(self.children())

    def forward(self, images: Float[Tensor, "B 3 H W"], content: Content | None = None) -> tuple[Tensor, ...]:
        """The maps, zero beyond the `content`."""
        content = content or Content(None, (images.shape[2], images.shape[3]))
        stem: Any = self.stem
        x = content.keep(_normalize(stem.bn1, stem.conv1(content.keep(images, 1)), content, 2), 2)
        x = content.keep(stem.maxpool(stem.relu(x)), 4)
        features, stride = [], 4
        for stage in self.stages[1:]:
            *blocks, last = stage.children()
            for block in (*blocks, last):
                x, stride = _run_block(block, x, content, stride, is_last=block is last)
            features.append(x)
        return tuple(features)

    def load_imagenet(self, name: str, weights: str) -> None:
        """Loads classification weights: a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`, ...) or a local file.

        Raises CheckpointError for a file that is missing, unreadable, of another architecture or cannot be fetched."""
        if is_file_name(weights):
            state = read_weights(Path(weights))
        else:
            known = torchvision.models.get_model_weights(name)
            check_choice(weights, ["DEFAULT", *(entry.name for entry in known), "FILE", None], "weights")
            otherwise = "give weights=FILE, or null to train from scratch"
            file = fetch(known[weights].url, f"{weights} of {name}", otherwise, key="weights")
            state = read_weights(file)  # torchvision's own loader would unpickle any file in the cache
        renamed = {f"stem.{key}" if key.startswith(("conv1.", "bn1.")) else key: state[key] for key in state}
        load_backbone(self, renamed, name=name, weights=weights)


def _run_block(block: Any, x: Tensor, content: Content, stride: int, *, is_last: bool) -> tuple[Tensor, int]:
    """The output of a residual block of torchvision for a map of this stride, and the output's stride.

    A map is made zero beyond the content where a convolution will look at its neighbours: before a 3x3 one, and at the
    end of a stage. This comes before the ReLU, which needs its own result for the gradient."""
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    out = x
    for conv, norm in layers:
        if conv is not block.conv1:
            out = block.relu(content.keep(out, stride) if conv.kernel_size != (1, 1) else out)
        stride *= conv.stride[0]
        out = _normalize(norm, conv(out), content, stride)
    if block.downsample is not None:
        conv, norm = block.downsample
        x = _normalize(norm, conv(x), content, stride)
    out += x
    if is_last or isinstance(block, BasicBlock):
        out = content.keep(out, stride)
    return block.relu(out), stride


def _normalize(norm: nn.Module, x: Tensor, content: Content, stride: int) -> Tensor:
    with_mask = isinstance(norm, (FoldedBatchNorm2d, GroupNorm))
    return norm(x, content.mask(stride)) if with_mask else norm(x)


def load_backbone(module: nn.Module, state: dict[str, Tensor], *, name: str, weights: str) -> None:
    """Loads `state`, which may hold more than `module` (a classifier, a detector of ours).

    Raises CheckpointError if a tensor of the module is missing or has another shape."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
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
    return state


def _load_pickled(file: Path) -> Any:
    if tarfile.is_tarfile(file):  # torch would unpack the archive before it looks at the content
        raise ValueError("a tar archive, as torch wrote before 2017")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:  # torch never compresses
                raise ValueError("compressed, and larger than it says")
    return torch.load(file, map_location="cpu", weights_only=True)


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor whose numbers can be copied."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)[:200]


def is_file_name(weights: str) -> bool:
    """Whether the argument `weights` is a file, not a name."""
    return Path(weights).suffix in {".safetensors", ".pth", ".pt"} or "/" in weights


def check_frozen_stages(count: int) -> None:
    """Raises ConfigError for a number of stages that no backbone has."""
    if not 0 <= count <= 5:
        raise ConfigError(f"{count} - give 0 (none) to 5 (all)", code="out-of-range", key="frozen_stages")


def _move_strides(net: nn.Module, name: str) -> None:
    """Puts the strides of all bottlenecks from their 3x3 into their first 1x1 convolution."""
    blocks = [module for module in net.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        problem = f"{name} has no bottlenecks - give false, or resnet50 and larger"
        raise ConfigError(problem, code="contradiction", key="stride_in_1x1")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _freeze(module: nn.Module) -> None:
    """No gradients, and BatchNorm turned into its frozen form, so that `train()` cannot thaw its statistics."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FoldedFrozenBatchNorm2d(child.num_features, eps=child.eps)
            state = {key: value for key, value in child.state_dict().items() if key != "num_batches_tracked"}
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            _freeze(child)


# Convolutions that do the work of the norm behind them, while the statistics of the norm are fixed.
#
# With scale = gamma / sqrt(var + eps) per output channel, norm(conv(x, w)) = conv(x, w scale) + (beta - mean scale):
# the small weights are scaled instead of the large activations. The state dict keeps the names and shapes of a
# convolution and a norm. Gradients reach the weights through the scale. Nothing is cached between calls, so weights and
# statistics may change at any time.
class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """The identity: the convolution before it applies its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """In training a BatchNorm2d; in evaluation the identity, because the convolution before it applies the learned
    statistics."""

    def forward(self, x: Tensor, mask: Float[Tensor, "B 1 H W"] | None = None) -> Tensor:
        """With a mask, the statistics are those of the cells where it is 1."""
        if not self.training:
            return x
        if mask is None:
            return super().forward(x)
        out, mean, var = normalize_content(x, mask, self.weight, self.bias, groups=None, eps=self.eps)
        count = mask.sum()
        unbiased = var[0] * (count / (count - 1).clamp(min=1))
        with torch.no_grad():
            for statistic, value in ((self.running_mean, mean[0]), (self.running_var, unbiased)):
                assert statistic is not None
                statistic.lerp_(value.to(statistic), self.momentum or 0.0)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return out


FoldedNorm = FoldedFrozenBatchNorm2d | FoldedBatchNorm2d


class FoldingConv2d(nn.Conv2d):
    """A convolution without bias that also applies the norm behind it, unless that norm is training."""

    folded: tuple[FoldedNorm]
    """The norm, which stays a child of the same parent; in a tuple, so that it is not registered as a child here."""

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.folded
        if isinstance(norm, FoldedBatchNorm2d) and norm.training:
            return super().forward(x)
        weight, bias = fold(self.weight, norm)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def fold(weight: Tensor, norm: FoldedNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals the one with `weight` followed by `norm` with its statistics."""
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    gamma, beta, mean, var = (tensor for tensor in statistics if tensor is not None)
    scale = gamma * (var + norm.eps).rsqrt()
    return weight * scale.view(-1, 1, 1, 1), beta - mean * scale


def fold_norms(module: nn.Module) -> None:
    """Makes every convolution within `module` do the work of the BatchNorm right behind it."""
    for parent in module.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, FoldedNorm):
                assert conv.out_channels == norm.weight.numel(), f"{name} is not what comes before {norm_name}"
                conv.__class__ = FoldingConv2d
                conv.folded = (norm,)  # type: ignore[assignment]  # it is a FoldingConv2d by now


@torch.no_grad()
def merge_norms(module: nn.Module) -> None:
    """Puts the statistics into the weights permanently, for inference: no weight is scaled per forward any more.

    The state dict changes: a merged convolution gains a bias and loses its norm."""
    for parent in module.modules():
        for (_, conv), (norm_name, _) in pairwise(list(parent.named_children())):
            if isinstance(conv, FoldingConv2d):
                conv.weight, conv.bias = map(nn.Parameter, fold(conv.weight, conv.folded[0]))
                del conv.folded
                conv.__class__ = nn.Conv2d  # type: ignore[assignment]
                setattr(parent, norm_name, nn.Identity())


def fetch(url: str, name: str, otherwise: str, *, key: str = "") -> Path:
    """The file behind `url` in torch's cache, downloaded if it is not there.

    name: of the weights, for the error. otherwise: what else a user could do. key: the argument that asked for them.

    Raises CheckpointError naming the file to bring, and where."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        digest = file.stem.rpartition("-")[2]  # the first digits of its SHA-256
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
        except (URLError, OSError, RuntimeError) as fault:
            problem = f"{name} could not be downloaded ({fault})"
            fix = f"put {file.name} into {file.parent}, or {otherwise}"
            raise CheckpointError(f"{problem} - {fix}", code="download", key=key) from None
    return file
