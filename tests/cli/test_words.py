"""Text is taken as it is typed; what other programs call a setting is answered with our word for it."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faults import refused
from retina.cli.compose import CONFIGS, compose, values_of
from retina.cli.words import SYNONYMS, TEXTS, as_typed, read_mapping, unknown, unreadable
from retina.errors import ConfigError

ODD = ["2024_11_28", "1e3", "0x1f", "1_000", "true", "nan", "no", "na\u00efve", "New folder (2)", "[2024] trip/*.jpg"]
ODD += ["runs/s__optimizer.lr=0.001", "a, b", "it's", 'say "x"', "{a: b}", "a:b", "C:\\", "a\\'b", " x ", "#1", "%&!?"]
ODD += ["\u5317\u4eac", "choice(a,b)", "range(3)", "a,b", "~x", "@x", "$HOME", "a=b=c", "-", "+1", "*", "'a' and 'b'"]


def is_plain(text: str) -> bool:
    """What means something else is left out: references, null, missing, and what is in quotes already."""
    kept = text in ("", "null") or (len(text) > 1 and text[0] in "'\"" and text[0] == text[-1])
    return "$" not in text and text != "???" and not kept


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(is_plain))
@example("a\\")
@example("\\'")
@example("\n")
def test_any_text_is_taken_as_it_is_typed(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(as_typed(f"name={text}"))
    value: Any = override.value()
    assert getattr(value, "text", value) == text
    (word,) = values_of(as_typed(f'name="{text}"', sweep=True)) if '"' not in text and "\\" not in text else [""]
    assert not word or word.startswith("name=")


@pytest.mark.parametrize("text", ODD)
def test_odd_text_arrives(text: str) -> None:
    assert compose("infer", ["checkpoint=x", f"source={text}"])["source"] == text
    train = compose("train", [f"name={text}", f"data.root={text}", f"++data.train.images={text}", f"init_from={text}"])
    assert (train["name"], train["data"]["root"], train["data"]["train"]["images"]) == (text, text, text)
    assert train["init_from"] == text


def test_what_is_no_text_keeps_its_meaning() -> None:
    for word in ("train.length=90000", "optimizer.lr=1e3", "~augment.flip", "train.ema=null", "model.levels=[3,4]"):
        assert as_typed(word) == word
    assert as_typed("name=null") == "name=null"
    assert as_typed("name='a, b'") == "name='a, b'"
    assert compose("train", ["name=${data.name}_x"])["name"] == "shapes_x"
    assert compose("import_weights", ["source=x", "output=y", "classes=[cat,dog]"])["classes"] == ["cat", "dog"]
    assert {"data.root", "data.train.annotations", "train.device", "name", "init_from"} <= TEXTS
    assert not {"train.length", "train.eval_every", "train.ema", "data.canvases"} & TEXTS


def test_commas_separate_the_jobs_of_a_sweep() -> None:
    assert values_of(as_typed("name=2024_11_28, 1e3,'a, b'", sweep=True)) == [
        "name='2024_11_28'",
        "name='1e3'",
        "name='a, b'",
    ]
    assert as_typed("name=choice(a,b)", sweep=True) == "name=choice(a,b)"
    assert values_of(as_typed("data.root=[2024] trip,x", sweep=True)) == ["data.root='[2024] trip'", "data.root='x'"]


def test_classes_are_mapped_as_text() -> None:
    word = "remap={1: 2024_11, voiture \u00e0 gaz: car, 'a, b': \"it's: x\", no: 1e3}"
    remap = {"1": "2024_11", "voiture \u00e0 gaz": "car", "a, b": "it's: x", "no": "1e3"}
    assert compose("train", [word])["remap"] == remap
    assert compose("train", ["remap.car=1e3"])["remap"] == {"car": "1e3"}
    assert compose("train", ["remap={}"])["remap"] == {}
    for text in ("car", "{car}", "[car, bus]"):
        with refused("wrong-type", "remap", kind=ConfigError):
            read_mapping(text)


@pytest.mark.parametrize(
    ("command", "word", "ours"),
    [
        ("train", "epochs=50", "train.length=50ep"),
        ("train", "imgsz=640", "data.short_side=640"),
        ("train", "batch=8", "train.batch_size=8"),
        ("train", "lr=0.1", "optimizer.lr=0.1"),
        ("train", "weights=x.pt", "init_from=x.pt"),
        ("train", "device=0", "train.device=cuda"),
        ("train", "+momentum=1", "--cfg job"),  # not of the optimizer chosen
        ("train", "resume=true", "the same command again resumes"),
        ("eval", "weights=x.pt", "checkpoint=x.pt"),
        ("infer", "conf=0.5", "score_threshold=0.5"),
    ],
)
def test_synonyms_are_answered_with_our_word(command: str, word: str, ours: str) -> None:
    with refused("unknown-key", word.partition("=")[0].lstrip("+"), ours, kind=ConfigError):
        compose(command, ["checkpoint=x", "source=y", word] if command == "infer" else [word])


def test_every_synonym_stands_for_a_key_that_some_command_has() -> None:
    known = ["optimizer.weight_decay", "optimizer.momentum", "model.backbone"]
    for file in CONFIGS.glob("*.yaml"):
        needed = re.findall(r"^(\w+): \?\?\?", file.read_text(), re.MULTILINE)
        if not file.stem.startswith("lab"):
            values = compose(file.stem, [f"{key}=x" for key in needed])
            known += [*values, *(f"{k}.{key}" for k, v in values.items() if isinstance(v, dict) for key in v)]
    for names, candidates in SYNONYMS.items():
        for candidate in candidates:
            assert candidate.format("1", key=names[0]).split()[-1].partition("=")[0] in known


def test_keys_at_the_top_that_mean_nothing_are_refused() -> None:
    for word in ("+foo.bar=5", "+callbacks.x=1"):
        with refused("unknown-key", word[1:4], kind=ConfigError):
            compose("train", [word])
    with refused("unknown-key", "did you mean train", kind=ConfigError):
        compose("train", ["+trian.x=1"])


def test_a_path_alone_is_answered_with_its_key(tmp_path: Path) -> None:
    assert "write checkpoint=runs/x" in str(unreadable("runs/x", "eval"))
    assert "write source=photos/" in str(unreadable("photos/", "infer"))
    assert f"write data=coco data.root={tmp_path}" in str(unreadable(str(tmp_path), "train"))
    assert unreadable("length", "train").code == "unreadable-override"
    assert unknown("zzz", "", ["a"]).code == "unknown-key"
