"""The words of a command line: values that are text are taken as they are typed, and a wrong word is answered in one
line that names the right one."""

import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from retina.cli.data import DataConfig
from retina.engine.config import TrainConfig, unknown_key
from retina.errors import ConfigError

QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
ITEM = re.compile(rf"""(?:{QUOTED.pattern}|\[[^\]]*\]|\{{[^}}]*\}}|\([^)]*\)|[^,])+""", re.DOTALL)
"""A value of a list with commas; commas in quotes and brackets do not separate."""
FUNCTION = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)

SYNONYMS = {
    ("epochs", "max_epochs", "num_epochs"): ["train.length={}ep"],
    ("steps", "max_steps", "max_iter", "iters"): ["train.length={}"],
    ("imgsz", "img", "img_size", "image_size", "imagesize"): ["data.short_side={}"],
    ("batch", "bs", "batch_size", "batchsize"): ["train.batch_size={}", "batch_size={}"],
    ("lr", "lr0", "learning_rate", "base_lr"): ["optimizer.lr={}"],
    ("momentum", "weight_decay"): ["optimizer.{key}={}"],
    ("weights", "pretrained", "load_from", "finetune"): ["init_from={}", "checkpoint={}"],
    ("model", "ckpt", "ckpt_path", "run"): ["checkpoint={}", "init_from={}"],
    ("backbone",): ["model.backbone={}"],
    ("device", "accelerator"): ["train.device=cuda", "device=cuda"],
    ("gpu", "gpus", "devices"): ["train.device=cuda", "device=cuda"],
    ("workers", "num_workers"): ["data.num_workers={}"],
    ("seed", "patience", "ema", "precision", "compile", "length", "accumulate"): ["train.{key}={}"],
    ("amp", "half", "fp16"): ["train.precision=bf16", "precision=bf16"],
    ("conf", "conf_thres", "threshold", "score"): ["score_threshold={}", "postprocess.score_threshold={}"],
    ("iou", "iou_thres", "nms"): ["postprocess.nms_iou={}"],
    ("project", "output_dir", "work_dir", "save_dir", "logdir", "out"): ["runs={}", "output={}"],
    ("root", "data_root", "dataset", "data_dir", "path"): ["data=coco data.root={}"],
    ("images", "input", "img_path"): ["source={}"],
    ("exist_ok", "force"): ["overwrite=true"],
}
"""What other programs call it, and what it is called here: the first whose key the command has."""

PLACES = {
    "train": "data=coco data.root",
    "eval": "checkpoint",
    "infer": "source",
    "doctor": "data=coco data.root",
    "pack": "data=coco data.root",
    "import_weights": "source",
}
"""The setting that a path alone is most likely meant for, by command."""


def text_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The fields of a settings class, and of those in it, that hold text: `str`, also with null or a list beside it."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # list[str] is no text
        options = set(typing.get_args(hint) if union else (hint,)) - {types.NoneType}
        if str in options and all(option is str or typing.get_origin(option) is list for option in options):
            yield f"{prefix}{field.name}"
        for option in options:
            if is_dataclass(option):
                yield from text_keys(typing.cast(type, option), f"{prefix}{field.name}.")


TEXTS = frozenset(
    [
        *text_keys(TrainConfig, "train."),
        *text_keys(DataConfig, "data."),
        *("name", "runs", "init_from", "model.weights", "model.backbone", "checkpoint", "source", "output", "classes"),
    ]
)
LISTS = frozenset(
    ["classes", *(f"data.{split}.{key}" for split in ("train", "val") for key in ("annotations", "images"))]
)
"""Of the keys that hold text, those that may hold a list as well."""


def as_typed(word: str, texts: Iterable[str] = (), *, sweep: bool = False) -> str:
    """The word with its value in quotes where the value is text, so that Hydra reads no number, list or call in it.

    null, what is quoted already, and, with `sweep`, the commas between values and functions such as `choice(a,b)`
    keep their meaning."""
    key, equals, value = word.partition("=")
    plain_key = key.lstrip("+")
    if not equals or key.startswith("~"):
        return word
    if plain_key == "remap" or plain_key.startswith("remap."):  # Hydra adds no key to an empty section unasked
        key = f"++{plain_key}"
    elif plain_key not in TEXTS and plain_key not in texts:
        return word
    if sweep and FUNCTION.fullmatch(value):
        return f"{key}={value}"
    parts = ITEM.findall(value) if sweep and value else [value]
    return f"{key}={','.join(_quoted(part.strip() if sweep else part, plain_key) for part in parts)}"


def _quoted(value: str, key: str) -> str:
    section = value.startswith("{_target_:")  # of a part of one's own, such as model.backbone
    a_list = key in LISTS and re.fullmatch(r"\[.*\]", value)
    verbatim = value in ("", "null") or section or QUOTED.fullmatch(value) or a_list
    return value if verbatim else QuotedString(value, Quote.single).with_quotes()


def read_mapping(text: str) -> dict[str, str]:
    """`{person: pedestrian, "a, b": 1}` as text by text, whatever YAML would read in the words.

    Raises ConfigError for anything else."""
    inside = text.strip()
    pairs = [pair.strip() for pair in ITEM.findall(inside[1:-1]) if pair.strip()]
    split = [re.fullmatch(rf"({QUOTED.pattern}|[^:]+):\s*(.+)", pair, re.DOTALL) for pair in pairs]
    if not (inside.startswith("{") and inside.endswith("}") and all(split)):
        raise ConfigError(f"{text!r} is no mapping - give {{name: name here, ...}}", code="wrong-type", key="remap")
    return {unquoted(match[1].strip()): unquoted(match[2].strip()) for match in split if match}


def unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if QUOTED.fullmatch(text) else text


def unreadable(word: str, command: str) -> ConfigError:
    """The answer to a word that is no override."""
    place = PLACES.get(command)
    if place and "=" not in word and (Path(word).exists() or "/" in word):
        return ConfigError(f"{word}: no key - write {place}={word}", code="no-key")
    fix = "write key=value, with quotes as in 'key=\"a, b\"'"
    return ConfigError(f"{word}: cannot be understood - {fix}", code="unreadable-override")


def unknown(key: str, value: str, known: Iterable[str], *, more: str = "") -> ConfigError:
    """The answer to a key that does not exist: what it is called here, or the nearest key there is.

    more: what is added where there is no other name for it."""
    known = list(known)
    if key == "resume":
        return ConfigError("no such key - leave it out: the same command again resumes", code="unknown-key", key=key)
    for names, candidates in SYNONYMS.items():
        for candidate in candidates if key in names else []:
            setting = candidate.format(value, key=key)
            if setting.split()[-1].partition("=")[0] in known:
                return ConfigError(f"no such key - here it is {setting}", code="unknown-key", key=key)
    return ConfigError(unknown_key(key, known) + more, code="unknown-key")


def unconverted(root: str) -> ConfigError | None:
    """The answer to a `data.root` that holds a data set of Pascal VOC or YOLO as it is."""
    folder = Path(root)
    if (folder / "annotations" / "instances_train.json").is_file():
        return None
    for images in (folder / "JPEGImages", *folder.glob("*/JPEGImages"), *folder.glob("VOCdevkit/*/JPEGImages")):
        if (images.parent / "Annotations").is_dir():
            return _to_convert(root, "Pascal VOC", f"format=voc source={images.parent}")
    if any((folder / name).exists() for name in ("data.yaml", "labels", "train/labels")):
        return _to_convert(root, "YOLO", f"format=yolo source={root}")
    return None


def _to_convert(root: str, layout: str, words: str) -> ConfigError:
    fix = f"convert it: python tools/convert.py {words} output=data/{Path(root).resolve().name}"
    return ConfigError(f"{root}: has the layout of {layout}, not COCO's - {fix}", code="not-coco")
