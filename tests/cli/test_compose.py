"""Overrides in, settings and objects out; every mistake is one line that names the key."""

import functools
import importlib
import logging
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations
import pytest
import torch

import retina.losses.boxes
import retina.losses.detection
from commands import one_line, refused_by_tool
from faults import refused
from reliability.hostile import laughs
from retina.cli import config_files
from retina.cli.build import build, call
from retina.cli.compose import CONFIGS, compose, entry
from retina.cli.data import DataConfig
from retina.data.checks import RecordsError
from retina.distributed import choose_device
from retina.engine.config import TrainConfig, from_mapping
from retina.errors import ConfigError, DataError

compose_module = importlib.import_module("retina.cli.compose")


@pytest.mark.parametrize(
    ("word", "code", "named"),
    [
        ("optimiser.lr=0.1", "unknown-key", ["optimiser.lr: ", "optimizer.lr?"]),
        ("train={lenght: 3}", "unknown-key", ["train.lenght: ", "train.length?"]),
        ("train.lenght=3", "unknown-key", ["train.lenght: ", "train.length?"]),
        ("optimizr=adamw", "unknown-key", ["optimizr: ", "optimizer?"]),
        ("modle/backbone=x", "unknown-key", ["modle/backbone: "]),
        ("~augment.flop", "unknown-key", ["augment.flop: ", "augment.flip?"]),
        ("loss.box_loss.beta=1", "unknown-key", ["loss.box_loss.beta: ", "+loss.box_loss.beta=..."]),
        ("zzz=1", "unknown-key", ["zzz: ", "--cfg job"]),
        ("data=cocoo", "no-such-option", ["data=cocoo: ", "coco, shapes"]),
        ("experiment=nothing", "no-such-option", ["experiment=nothing: ", "bccd, coco_r101_3x"]),
        ("+optimizer.lr=1", "exists", ["optimizer.lr: "]),
        ("optimizer.lr=0.1,0.2", "several-values", ["optimizer.lr=0.1,0.2: ", "-m"]),
        ("length", "unreadable-override", ["length: ", "key=value"]),
        ("optimizer=[1]", "wrong-value", []),
        ("train.length=[1", "unreadable-override", ["train.length=[1: "]),
        ("name=${nome}", "wrong-value", ["name: ", "nome"]),
        ("experiment=null", "wrong-value", ["settings: "]),
        ("name=???", "missing-setting", ["name: "]),
        ("hydra/launcher=nothing", "no-such-option", ["hydra/launcher=nothing: ", "basic"]),
    ],
)
def test_a_wrong_override_is_one_line(word: str, code: str, named: list[str]) -> None:
    with refused(code, *named, kind=ConfigError):
        compose("train", [word])


def test_the_nearest_key_is_looked_for_under_the_groups_chosen() -> None:
    with refused("unknown-key", "optimizer.betas?"):
        compose("train", ["optimizer=adamw", "optimizer.beta=1"])
    with refused("unknown-key", "zzz: ", "--cfg job"):
        compose("eval", ["zzz=1"])


def test_all_missing_settings_at_once() -> None:
    with refused("missing-setting", "checkpoint: ", "source: "):
        compose("infer", [])


def test_values_arrive_as_typed() -> None:
    settings = compose("train", ['name="a, b"', "data=coco", "data.root=/a b/c", "train.length=3ep", "train.ema=null"])
    assert (settings["name"], settings["data"]["root"]) == ("a, b", "/a b/c")
    assert (settings["train"]["length"], settings["train"]["ema"]) == ("3ep", None)
    assert type(settings) is dict
    assert type(settings["data"]["train"]) is dict
    assert "hydra" not in settings


@pytest.mark.parametrize(
    ("cls", "word", "code", "named"),
    [
        (TrainConfig, "train.batch_size=many", "wrong-type", ["train.batch_size: 'many'", "int"]),
        (TrainConfig, "train.ema=true", "wrong-type", ["train.ema: True", "float or null"]),
        (TrainConfig, "train.length=abc", "out-of-range", ["train.length: 'abc'"]),
        (TrainConfig, "+train.lengt=1", "unknown-key", ["train.lengt: ", "train.length?"]),
        (DataConfig, "data.short_side=wide", "wrong-type", ["data.short_side: 'wide'", "int"]),
        (DataConfig, "data.train=x.json", "wrong-type", ["data.train: 'x.json'"]),
    ],
)
def test_wrong_types_in_sections(cls: type, word: str, code: str, named: list[str]) -> None:
    section = "train" if cls is TrainConfig else "data"
    with refused(code, *named, kind=ConfigError):
        from_mapping(cls, compose("train", [word])[section], section)


def test_typed_names_the_key_of_a_whole_command() -> None:
    with refused("wrong-type", "batch_size: 'x'", "int"):
        from_mapping(TrainConfig, {"batch_size": "x"})


def test_classes_are_remapped_as_the_documents_write_it() -> None:
    page = (CONFIGS.parent / "docs" / "weights.md").read_text()
    (word,) = re.findall(r"`'(remap=[^`]*)'`", page)
    assert compose("train", [word])["remap"] == {"car": "vehicle"}


def test_augmentations_from_the_command_line() -> None:
    words = ["augment.flip.p=0", "+augment.blur._target_=albumentations.Blur", "+augment.blur.blur_limit=[3,5]"]
    augment = compose("train", words)["augment"]
    assert list(augment) == ["flip", "resize", "blur"]
    assert build(augment["flip"], "augment.flip").p == 0
    assert isinstance(build(augment["blur"], "augment.blur"), albumentations.Blur)
    assert list(compose("train", ["~augment.flip"])["augment"]) == ["resize"]


def test_nested_sections_are_built_also_in_lists() -> None:
    blur = {"_target_": "albumentations.Blur", "p": 0.25}
    some = build({"_target_": "albumentations.OneOf", "transforms": [blur, blur | {"p": 1}]}, "augment.some")
    assert [transform.p for transform in some.transforms] == [0.25, 1]
    loss = build(compose("train", ["loss=focal", "+loss.box_loss.beta=0.5"])["loss"], "loss")
    assert isinstance(loss, retina.losses.detection.DetectionLoss)


def test_partial_and_extra_arguments() -> None:
    section = compose("train", ["optimizer=sgd", "optimizer.lr=0.5"])["optimizer"]
    factory = build(section, "optimizer", momentum=0.25)
    assert isinstance(factory, functools.partial)
    (group,) = factory([torch.zeros(1, requires_grad=True)]).param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("augment", "os.system"),
        ("augment", "builtins.eval"),
        ("augment", "eval"),
        ("augment", "retina"),
        ("augment", "albumentations"),
        ("augment", "retina.data.transforms."),
        ("augment", "retina.data.transforms.Pipeline "),
        ("optimizer", "torch.load"),
        ("optimizer", "torch.optim"),
        ("loss", "retinax.y"),
        # an allowed module's own imports are not its own
        ("augment", "retina.data.transforms.os.system"),
        ("augment", "retina.data.transforms.os"),
        ("augment", "retina.data.transforms.random.Random"),
        ("augment", "retina.data.transforms.blake2b"),
        ("augment", "albumentations.core.serialization.Path"),
        ("augment", "albumentations.core.utils.get_args"),
        ("augment", "albumentations.check_version.urllib.request.urlopen"),
        ("augment", "albumentations.suppress"),
        ("data", "retina.data.shapes.shutil.rmtree"),
        ("data", "retina.data.shapes.shutil"),
        ("optimizer", "torch.optim.lr_scheduler.types.FunctionType"),
        ("optimizer", "torch.optim.lr_scheduler.partial"),
        ("optimizer", "torch.optim.optimizer.torch.hub.load"),
        # what is its own, but no public class or function
        ("loss", "retina.losses.detection._with_one_padding"),
        ("loss", "retina.losses.boxes.__loader__.get_data"),
        ("loss", "retina.losses.boxes.__builtins__"),
        ("loss", "retina.losses.detection.DetectionLoss.forward"),
        ("loss", "retina.losses.detection.DetectionLoss.__init__.__globals__"),
        ("augment", "albumentations.Blur.from_pretrained"),
        ("augment", "albumentations.core.serialization.SerializableMeta"),
        # functions of other libraries: these read files and call the network
        ("augment", "albumentations.load"),
        ("augment", "albumentations.from_dict"),
        ("augment", "albumentations.check_for_updates"),
        ("optimizer", "torch.optim.swa_utils.update_bn"),
        # allowed elsewhere: a section makes its own kind only
        ("augment", "retina.data.shapes.write_shapes"),
        ("data", "retina.cli.run_folder.open_run"),
        ("schedule", "torch.optim.lr_scheduler.StepLR"),
        ("loss.box_loss", "torch.optim.SGD"),
    ],
)
def test_targets_outside_the_allowed_are_refused(section: str, target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": target, "command": "true"}, f"{section}.x" if "." not in section else section)
    assert caught.value.code in ("not-allowed", "unknown-target")
    assert caught.value.key.endswith("._target_")
    assert f": {target} " in str(caught.value)


def test_nothing_is_imported_to_find_out_that_it_is_not_allowed() -> None:
    for target in ("antigravity.x", "retina.data.transforms..antigravity.x", "albumentations/../antigravity.x"):
        with refused("not-allowed", target):
            build({"_target_": target}, "augment.x")
    assert "antigravity" not in sys.modules


def test_what_only_pretends_to_be_at_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def smooth_l1() -> None: ...

    def pretender() -> None: ...

    for function in (smooth_l1, pretender):
        function.__module__, function.__qualname__ = "retina.losses.boxes", "smooth_l1"
    monkeypatch.setattr(retina.losses.boxes, "pretender", pretender, raising=False)
    monkeypatch.setattr(retina.losses.boxes, "short", functools.partial(print), raising=False)
    monkeypatch.setattr(retina.losses.boxes, "nameless", lambda: None, raising=False)
    for name in ("pretender", "short", "nameless"):
        with refused("not-allowed", name):
            build({"_target_": f"retina.losses.boxes.{name}"}, "loss")


def test_a_module_of_ones_own_can_be_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ones_own_losses.py").write_text("def squared(scale):\n    return scale\n")
    monkeypatch.syspath_prepend(tmp_path)
    section = {"_target_": "ones_own_losses.squared", "scale": 3}
    with refused("not-allowed", "loss._target_: ones_own_losses.squared"):
        build(section, "loss")
    assert build(section, "loss", plugins=["ones_own_losses"]) == 3
    nested = {"_target_": "retina.losses.detection.DetectionLoss", "assigner": section}
    with refused("not-allowed", "loss.assigner._target_: ones_own_losses.squared"):
        build(nested, "loss")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('name: !!python/object/apply:os.system ["touch canary"]', "python/object/apply:os.system"),
        ("name: !!python/name:os.system", "python/name:os.system"),
        ("name: [", ""),
        ("name: a\nname: b", "name"),
        (f"name: {'[' * 3000}", ""),
        ("name: ${nowhere:1}", "nowhere"),
        (f"name: {'${' * 50}{'}' * 50}", ""),
        ("5", "theirs.yaml"),
        ("defaults: [{5: a}]", ""),
        ("defaults: [{'@': x}]", ""),
        (laughs(4), "aliases"),
        (f"a: &a [{'x, ' * 110}x]\nb: [{'*a, ' * 100}*a]", "aliases"),
        ("a: &a [x, *a]", "aliases"),
        ("a: &a {b: 1, <<: [*a]}", ""),
    ],
)
def test_a_config_file_that_is_no_plain_yaml(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    with refused("wrong-value", part, kind=ConfigError):
        compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=theirs"])


def doubled(first: str, again: str, levels: int = 11) -> str:
    """Settings of `augment.all`, each of which stands twice for the one before, as `again` writes it."""
    lines = [f"a0: {first}", *(f"a{n}: {again.format(f'${{augment.all.a{n - 1}}}')}" for n in range(1, levels))]
    return "\n    ".join(["augment:\n  all:", *lines])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (doubled("xxxxxxxx", "'{0}{0}'"), "interpolations"),
        (doubled("''", "'{0}{0}'"), "interpolations"),
        (doubled("[x]", "['{0}', '{0}']"), "interpolations"),
        (doubled("x", "'${{oc.create:[{0},{0}]}}'"), "interpolations"),
        (f"name: {'x' * 9000}\nruns: {'${name}' * 20}", "interpolations"),
        ("defaults: [/augment@b: l5]", "lists of defaults"),
    ],
)
def test_a_few_lines_that_stand_for_much(text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_files, "MOST_RESOLVED", config_files.MOST_RESOLVED // 10)
    monkeypatch.setattr(config_files, "MOST_LOADED", config_files.MOST_LOADED // 5)
    for folder in ("experiment", "augment"):
        (tmp_path / folder).mkdir()
    (tmp_path / "augment" / "l0.yaml").write_text("x: 1\n")
    for n in range(1, 6):
        (tmp_path / "augment" / f"l{n}.yaml").write_text(
            f"defaults: [{{/augment@x: l{n - 1}}}, {{/augment@y: l{n - 1}}}]\n"
        )
    (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    with refused("wrong-value", part, kind=ConfigError):
        compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=theirs"])


@pytest.mark.parametrize(
    ("key", "misspelt", "name"),
    [
        ("augment.blur", "albumentations.Blurr", "Blur"),
        ("loss.assigner", "retina.ops.assigners.ATTS", "ATSS"),
        ("loss.assigner", "retina.ops.assigners.TaskAlined", "TaskAligned"),
        ("loss.assigner", "retina.ops.assigners.MaxIou", "MaxIoU"),
        ("augment.color", "retina.data.transforms.ColourJitter", "ColorJitter"),
        ("augment.scale", "retina.data.transforms.LargeScaleJiter", "LargeScaleJitter"),
        ("augment.resize", "retina.data.transforms.ResizeShortside", "ResizeShortSide"),
        ("loss", "retina.losses.VarifocalLos", "VarifocalLoss"),
    ],
)
def test_a_misspelt_target_finds_the_nearest_wherever_its_class_is_defined(key: str, misspelt: str, name: str) -> None:
    with refused("unknown-target", f"{key}._target_", misspelt, f"{misspelt.rpartition('.')[0]}.{name}?"):
        build({"_target_": misspelt}, key)


def test_a_target_in_no_module_names_none() -> None:
    with refused("unknown-target", "augment.blur._target_", "retina.data.transforms.nowhere.Blur"):
        build({"_target_": "retina.data.transforms.nowhere.Blur"}, "augment.blur")


@pytest.mark.parametrize("section", [None, 3, {}, {"p": 1}, {"_target_": 3}])
def test_a_section_that_makes_nothing(section: Any) -> None:
    with refused("no-target", "augment.flip: "):
        build(section, "augment.flip")


def test_all_bad_arguments_at_once() -> None:
    blur = {"_target_": "albumentations.Blur", "blur_limt": 3, "q": 1}
    with refused("unknown-key", "augment.blur.blur_limt: ", "augment.blur.blur_limit?", "augment.blur.q: "):
        build(blur, "augment.blur")
    resize = {"_target_": "retina.data.transforms.ResizeShortSide", "long": 3}
    with refused("unknown-key", "augment.resize.long: ", "resize.long_side?", "augment.resize.short_side: missing"):
        build(resize, "augment.resize")
    with refused("unknown-key", "optimizer.lrr: "):
        build({"_target_": "torch.optim.SGD", "_partial_": True, "lrr": 1}, "optimizer")


def test_a_refused_value_is_one_line() -> None:
    with refused("wrong-value", "augment.blur: ", "blur_limit"):
        build({"_target_": "albumentations.Blur", "blur_limit": "wide"}, "augment.blur")
    with refused("wrong-value", "train.device: ", "seven"):
        call(choose_device, "train.device", name="seven")


def ending(task: Callable[[dict[str, Any]], int | None], *words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        entry("eval")(task)(list(words))
    return ended.value.code


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(settings: dict[str, Any]) -> None:
        raise DataError("x.json: it is broken - mend it")

    assert ending(lambda settings: None) == 0
    assert ending(lambda settings: 3) == 3
    capsys.readouterr()
    assert ending(faulty) == 2
    assert capsys.readouterr() == ("", "error: x.json: it is broken - mend it\n")
    assert ending(faulty, "traceback=true") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_is_one_harmless_line(capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(settings: dict[str, Any]) -> None:
        raise OSError(5, "broken\x1b[31m", "a\nb\x1b]0;title\x07.txt")

    assert ending(faulty) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: a\\nb\\x1b]0;title\\x07.txt: broken\\x1b[31m - ")
    assert err.count("\n") == 1


def test_handlers_are_the_programs_only_while_it_runs() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    seen: list[Any] = []
    assert ending(lambda settings: seen.extend(signal.getsignal(number) for number in numbers)) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    assert all(handler not in before for handler in seen)
    assert len(seen) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_start_up_at_once(
    number: signal.Signals, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """At a random instant after the program has begun: while torch is loaded, data is made or the model is built."""
    words = ["runs=runs", "data.root=shapes", "model.backbone=resnet18", "train.device=cpu", "experiment=smoke"]
    process = start("-v", CONFIGS.parent / "tools" / "train.py", *words, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:  # -v names the modules as they are imported: the handlers are set before this one is
        if line.startswith("import 'torch.") or ("matches" in line and "/torch/" in line):
            break
    time.sleep(random.Random(number).uniform(0, 3))
    process.send_signal(number)
    _, err = process.communicate(timeout=1000)
    assert process.returncode == 128 + number, err[-2000:]
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err


def test_many_faulty_records_are_listed_beside_the_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(settings: dict[str, Any]) -> None:
        raise RecordsError([f"x.json: record {i}: bad" for i in range(25)])

    assert ending(faulty) == 2
    out, err = capsys.readouterr()
    assert err == "error[records]: x.json: record 0: bad (and 24 more)\n"
    assert out.splitlines()[19] == "x.json: record 19: bad (and 5 more like it)"


def test_defaults_are_added_to_what_is_typed() -> None:
    seen: list[dict[str, Any]] = []
    task = entry("train", default=lambda typed: [] if typed else ["experiment=shapes"])(
        lambda settings: seen.append(settings)
    )
    for words in ([], ["data=coco"]):
        with pytest.raises(SystemExit):
            task(words)
    assert [settings["data"]["name"] for settings in seen] == ["shapes", "coco"]
    assert seen[0]["model"]["backbone"] == "resnet18"
    assert seen[1]["model"]["backbone"] == "resnet50"


def test_cfg_job_prints_and_does_nothing(tool: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("infer", "--cfg", "job") == 0
    assert "checkpoint: ???" in capsys.readouterr().out
    assert tool("train", "name=x", "--cfg", "job", "--resolve", "data=coco") == 0
    out = capsys.readouterr().out
    assert "name: x\n" in out
    assert "${" not in out
    assert tool("train", "--help") == 0
    assert "torchrun" in capsys.readouterr().out
    assert tool("train", "--multi") == 2
    assert "--multi" in one_line(capsys)


def test_mistakes_are_told_before_torch_is_loaded(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    commands = [
        ["train", "optimiser.lr=0.1"],
        ["train", "data=cocoo"],
        ["train", "train.batch_size=x"],
        ["train", "data.short_side=x"],
        ["eval", "batch_size=x", "checkpoint=y"],
        ["eval"],
        ["infer", "checkpoint=y", "source=nowhere"],
        ["infer", "checkpoint=y", "source=nowhere", "score_threshold=2"],
    ]
    script = f"""
import runpy, sys
for name, *words in {commands!r}:
    sys.argv = [name, *words]
    try:
        runpy.run_path(f"{CONFIGS.parent}/tools/{{name}}.py", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 2, (name, words, ended.code)
print([name for name in ("torch", "torchvision", "albumentations") if name in sys.modules])
"""
    process = start("-c", script, cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "[]"
    assert all(re.match(r"error(\[[a-z-]+\])?: ", line) for line in err.splitlines()), err
    assert len(err.splitlines()) == len(commands)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_gone_ends_the_program_quietly(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(CONFIGS.parent / "tools" / "train.py", "--cfg", "job", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(("folders", "words"), [(["Annotations", "JPEGImages"], "voc"), (["labels", "images"], "yolo")])
def test_a_data_set_of_another_layout_is_answered_with_the_converter(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[str], words: str
) -> None:
    for folder in folders:
        (tmp_path / "mine" / folder).mkdir(parents=True)
    root = tmp_path / "mine"
    assert tool("train", "data=coco", f"data.root={root}", f"runs={tmp_path}", "train.device=cpu") == 2
    command = f"tools/convert.py format={words} source={root} output=data/mine"
    refused_by_tool(capsys, "not-coco", command)


def test_configs_of_ones_own(tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "defaults: [train, _self_]\nname: &name mine\nruns: *name\ntrain: {length: 3ep}\n"
    )
    experiment = "# @package _global_\ndefaults: [/experiment/smoke, _self_]\nname: own\n"
    (tmp_path / "experiment" / "own.yaml").write_text(experiment)
    (tmp_path / "bomb.yaml").write_text(laughs(4))
    for words in (["--config-dir", tmp_path], ["--config-path", tmp_path]):
        assert tool("train", *words, "-cn", "bomb") == 2
        refused_by_tool(capsys, "wrong-value", tmp_path / "bomb.yaml", "aliases")
    for words in (["--config-dir", tmp_path], [f"hydra.searchpath=[file://{tmp_path}]"]):
        assert tool("train", *words, "experiment=own", "--cfg", "job") == 0
        assert "name: own\n" in capsys.readouterr().out
    assert tool("train", "--config-dir", tmp_path, "-cn", "mine", "--cfg", "job") == 0
    out = capsys.readouterr().out
    assert "name: mine\n" in out
    assert "length: 3ep\n" in out
    assert tool("train", "-cn", "nowhere") == 2
    refused_by_tool(capsys, "no-such-option", "--config-name=nowhere: ")
    assert tool("train", "--config-dir", tmp_path / "nowhere") == 2
    refused_by_tool(capsys, "no-config-dir", tmp_path / "nowhere")
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    assert tool("train", "--info", "searchpath") == 0
    assert "configs" in capsys.readouterr().out
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


def test_configs_folder_is_the_one_beside_the_tools() -> None:
    assert Path(compose_module.__file__).parents[2] / "configs" == CONFIGS
    assert (CONFIGS / "train.yaml").is_file()
