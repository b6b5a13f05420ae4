"""A process that feeds hostile files to the programs while everything it does to the outside is written down:

    python watched.py FOLDER

writes FOLDER/report.json. A process of its own, for an audit hook can never be removed. What the programs may write is
under FOLDER/own; nothing else may change, nothing may be run, no socket opened, and no SECRET read."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

SECONDS, BYTES = 120, 4 << 30
"""No case may take longer, nor the process more memory: a bomb that goes off must not take the machine with it."""
FOLDER = Path(sys.argv[1]).resolve()
OWN = FOLDER / "own"
TESTS = Path(__file__).resolve().parents[1]
NETWORK = {"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
PROCESSES = {
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn",
    "subprocess.Popen", "webbrowser.open", "ctypes.dlopen", "pickle.find_class",
}  # fmt: skip
CHANGES = {
    "os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr",
    "os.symlink", "os.truncate", "os.utime", "shutil.rmtree",
}  # fmt: skip
_ASK = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(TESTS.parent)]
GIT = ([*_ASK, "rev-parse", "HEAD"], [*_ASK, "status", "--porcelain", "--untracked-files=no"])
"""How a run asks for the commit of its program, in a checkout."""
LISTING = ("os.scandir", "pathlib.Path.glob")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

case = "imports"
seen: list[tuple[str, str, str]] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Only network events count while modules are imported: torch asks programs which machine this is."""
    if event in NETWORK:
        note(event, arguments)
    elif case in ("imports", "between") or (event == "subprocess.Popen" and list(arguments[1]) in GIT):
        return
    elif event == "ctypes.dlopen" and arguments == (None,):
        return  # this process itself, whose C library is told to keep memory
    elif event in PROCESSES or any(word in repr(arguments) for word in ("CANARY", "SECRET") if event not in LISTING):
        note(event, arguments)
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and (flags & WRITING) and not may_write(path):
            note(event, arguments)
    elif event == "os.mkdir" and arguments[0] == "." and os.getcwd() == str(OWN):
        return  # Hydra makes sure of the folder it is in
    elif event in CHANGES and not all(map(may_write, (a for a in arguments if isinstance(a, str | bytes)))):
        note(event, arguments)


def note(event: str, arguments: tuple[Any, ...]) -> None:
    seen.append((case, event, repr(arguments)[:300]))


def may_write(path: str | bytes) -> bool:
    name = os.path.abspath(os.fsdecode(path))
    return name == os.devnull or name.startswith(f"{OWN}{os.sep}")


sys.addaudithook(watch)
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(Path(__file__).parent)]
sys.dont_write_bytecode = True

import hostile  # noqa: E402
import matplotlib.font_manager  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import tiny  # noqa: E402
from retina.cli.data import (  # noqa: E402
    DataConfig,
    check_data,
    load_split,
)
from retina.data.checks import DataReport  # noqa: E402
from retina.data.coco import read_coco  # noqa: E402
from retina.data.images import image_size, read_image  # noqa: E402
from retina.data.shapes import write_shapes  # noqa: E402
from retina.data.transforms import Pipeline  # noqa: E402, F401  (it keeps albumentations from calling the network)
from retina.engine.config import from_mapping  # noqa: E402
from retina.errors import RetinaError  # noqa: E402
from retina.model.backbone import ResNet  # noqa: E402
from retina.model.pretrained import read_weights  # noqa: E402
from retina.model.weights import load_detector, read_card  # noqa: E402


def program(name: str, *words: object) -> Callable[[], object]:
    """tools/<name>.py with these words; returns its exit code and what it said."""

    def run() -> object:
        main = importlib.import_module(f"retina.cli.{name}").main
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            return ended.code
        return None

    return run


def observe(name: str, do: Callable[[], object]) -> dict[str, Any]:
    """What became of one case."""
    global case
    out, err = io.StringIO(), io.StringIO()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result, fault = None, None
    case = name
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = do()
    except RetinaError as refusal:
        fault = str(refusal)
    except BaseException as stranger:
        fault = f"TRACEBACK {type(stranger).__name__}: {stranger}"
    case = "between"
    signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {
        "result": result if isinstance(result, int) else None,
        "fault": fault,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "megabytes": grown >> 10,
    }


def pickles() -> dict[str, Callable[[], object]]:
    """Every payload in a file of its own, in every container and under every name that weights may have."""
    cases: dict[str, Callable[[], object]] = {}
    for name, opcodes in hostile.payloads(FOLDER).items():
        (FOLDER / f"{name}.pth").write_bytes(hostile.as_zip(opcodes))
        for container, make in hostile.CONTAINERS.items():
            file = FOLDER / f"{name}.{container}.pth"
            file.write_bytes(make(opcodes))
            cases[f"pickle {name} in {container}"] = lambda file=file: read_weights(file)
    opcodes = hostile.payloads(FOLDER)["os.system"]
    for suffix in (".safetensors", ".pt", "", ".weights", ".ckpt"):
        for container, make in hostile.CONTAINERS.items():
            file = FOLDER / f"model_{container}{suffix}"
            file.write_bytes(make(opcodes))
            cases[f"pickle {container} as {file.name}"] = lambda file=file: read_weights(file)
    for container, make in hostile.CONTAINERS.items():
        run = FOLDER / f"run_{container}"
        run.mkdir()
        (run / "best.safetensors").write_bytes(make(opcodes))
        cases[f"pickle {container} as best.safetensors"] = program("eval", f"checkpoint={run}")
        cached = OWN / "hub" / container / "checkpoints" / "resnet18-f37072fd.pth"
        cached.parent.mkdir(parents=True)
        cached.write_bytes(make(opcodes))
        cases[f"pickle {container} in the cache"] = lambda home=cached.parents[1]: from_cache(home)
    return cases


def from_cache(home: Path) -> None:
    torch.hub.set_dir(str(home))
    ResNet("resnet18", norm="batch", frozen_stages=0).load_imagenet("resnet18", "DEFAULT")


def train_words(name: str, data: Path) -> list[str]:
    return [
        "data=coco",
        f"name={name}",
        f"data.root={data}",
        "data.short_side=64",
        "data.long_side=96",
        "data.num_workers=0",
        "model.backbone=resnet18",
        "model.levels=[3,4,5]",
        "model.fpn_channels=16",
        "model.head_convs=1",
        "train.length=2",
        "train.batch_size=2",
        "train.eval_every=2",
        "train.save_every=2",
        "train.log_every=1",
        "train.device=cpu",
        "train.channels_last=false",
    ]


def configs(data: Path, run: Path) -> dict[str, Callable[[], object]]:
    """Sections that would run something, in the user's own words, in a file of settings and in a stranger's run."""
    canary = str(FOLDER / hostile.CANARY)
    shell = f"touch {canary}"
    cases: dict[str, Callable[[], object]] = {}
    words = {
        "loss": ["loss._target_=os.system", f"+loss.command='{shell}'"],
        "nested": ["loss.box_loss._target_=subprocess.getoutput", f"+loss.box_loss.cmd='{shell}'"],
        "partial": ["optimizer={_target_: functools.partial, _partial_: true}"],
        "re-exported": ["+augment.x={_target_: retina.data.transforms.os.system, command: '" + shell + "'}"],
        "method": ["schedule._target_=pathlib.Path.touch", f"+schedule.self={canary}"],
        "prepare": ["data.prepare={_target_: shutil.rmtree, path: '" + canary + "'}"],
        "module": ["postprocess={_target_: " + hostile.CANARY + ".run, _partial_: true}"],
    }
    for name, given in words.items():
        cases[f"config {name}"] = program("train", *train_words("evil", data), *given)
    (FOLDER / "theirs" / "experiment").mkdir(parents=True)
    tag = f'# @package _global_\nname: !!python/object/apply:os.system ["{shell}"]\n'
    (FOLDER / "theirs" / "experiment" / "evil.yaml").write_text(tag)
    searched = f"hydra.searchpath=[file://{FOLDER / 'theirs'}]"
    cases["config tag"] = program("train", *train_words("evil", data), searched, "experiment=evil")
    section = {"name": "x", "root": str(data), "short_side": 64, "long_side": 96, "num_workers": 0}
    shapes = {"_target_": "retina.data.shapes.write_shapes", "num_train": 1, "num_val": 1, "image_size": [64, 64]}
    strangers = {
        "tag in a run": tag,
        "prepare in a run": yaml.safe_dump(
            {"data": section | {"prepare": {"_target_": "os.system", "command": shell}}}
        ),
        "shapes in a run": yaml.safe_dump({"data": section | {"root": canary, "prepare": shapes}}),
        "environment in a run": yaml.safe_dump({"data": section | {"root": "${oc.env:LEAK}"}}),
        "no section in a run": "data: [1, 2]",
        "no place in a run": yaml.safe_dump({"data": section | {"val": [1]}}),
        "limits in a run": yaml.safe_dump({"data": section | {"max_pixels": 1}}),
        "laughs in a run": hostile.laughs(),
        "depth in a run": "data: " + "[" * 100_000,
    }
    weights = (run / "best.safetensors").read_bytes()
    for name, text in strangers.items():
        folder = OWN / name.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "best.safetensors").write_bytes(weights)
        (folder / "config.yaml").write_text(text)
        cases[f"config {name}"] = program("eval", f"checkpoint={folder}", "device=cpu")
    words = train_words("laughs_in_a_run", data)
    cases["config laughs where a run is to be"] = program("train", *words, f"runs={OWN}")
    return cases


def cards(run: Path) -> dict[str, Callable[[], object]]:
    """Weights whose header asks for more than a model."""
    evil = FOLDER / "os.system.zip.pth"
    card = json.loads(json.dumps(vars(read_card(run / "best.safetensors"))))
    model = card["model"]
    asked = {
        "weights file": card | {"model": model | {"weights": str(evil)}},
        "download": card | {"model": model | {"weights": "DEFAULT"}},
        "target": card | {"model": {"_target_": "os.system", "command": f"touch {FOLDER / hostile.CANARY}"}},
        "postprocess": card | {"postprocess": {"_target_": "os.system"}},
        "list": [1],
    }
    cases: dict[str, Callable[[], object]] = {}
    for name, header in asked.items():
        file = FOLDER / f"card_{name}.safetensors".replace(" ", "_")
        save_file({"w": torch.zeros(1)}, file, {"retina": json.dumps(header)})
        source = run.parent.parent / "data" / "val"
        words = (f"checkpoint={file}", f"source={source}", f"output={OWN / 'never'}", "device=cpu")
        cases[f"card {name}"] = program("infer", *words)
    file = FOLDER / "card_depth.safetensors"
    save_file({"w": torch.zeros(1)}, file, {"retina": "[" * 200_000})
    cases["card depth"] = program("infer", f"checkpoint={file}", *words[1:])
    return cases


def paths(data: Path, run: Path) -> dict[str, Callable[[], object]]:
    """Annotation files whose one image has a name that leads elsewhere."""
    root = FOLDER / "paths"
    images = root / "images"
    images.mkdir(parents=True)
    picture = next((data / "val").glob("*.jpg"))
    height, width = image_size(picture)
    for file in (images / "ok.jpg", root / f"{hostile.SECRET}.jpg"):
        file.write_bytes(picture.read_bytes())
    hostile.make_links(images)
    categories = json.loads((data / "annotations" / "instances_val.json").read_text())["categories"]
    object_ = {"id": 1, "image_id": 1, "category_id": categories[0]["id"], "bbox": [1, 1, 20, 20]}
    cases: dict[str, Callable[[], object]] = {}
    for name, file_name in hostile.traversals(root).items():
        file = root / f"{name.replace(' ', '_')}.json"
        image = {"id": 1, "file_name": file_name, "width": width, "height": height}
        file.write_text(json.dumps({"images": [image], "annotations": [object_], "categories": categories}))
        places = {"annotations": str(file), "images": str(images)}
        config = from_mapping(DataConfig, {"name": "x", "train": places, "val": places}, "data")
        cases[f"path {name}"] = lambda config=config: read_all(config)
    config = replace(config, allow_outside=True, val=replace(config.val, annotations=str(root / "parent.json")))
    words = ["data=coco", f"data.val.annotations={root / 'parent.json'}", f"data.val.images={images}"]
    words += [f"checkpoint={run}", f"output={OWN / 'paths'}", "device=cpu", "data.num_workers=0"]
    cases["path in eval"] = program("eval", *words)
    cases["control path"] = lambda: read_all(config)
    return cases


def read_all(config: DataConfig) -> None:
    """What every program does first, and then each image."""
    annotations = load_split(config, "val")
    check_data(config, {"val": annotations}, DataReport())
    for index in range(len(annotations)):
        read_image(annotations.path(index))


def bombs(data: Path, run: Path) -> dict[str, Callable[[], object]]:
    """Small files that claim to be large, or become so."""
    files = {name: FOLDER / f"bomb_{name}" for name in ("deep.json", "huge.json", "bomb.png", "a", "b", "zip.pth")}
    files["deep.json"].write_bytes(hostile.deep_json())
    annotations = json.loads((data / "annotations" / "instances_val.json").read_text())
    files["huge.json"].write_text(hostile.huge_numbers(annotations))
    files["bomb.png"].write_bytes(hostile.png(60_000, 60_000, bytes(1 << 20)))
    files["a"].write_bytes(hostile.claims_much())
    files["b"].write_bytes(hostile.claims_tensor())
    torch.save({"w": torch.zeros(4)}, files["zip.pth"])
    files["zip.pth"].write_bytes(hostile.zip_bomb(files["zip.pth"].read_bytes()))
    for name in ("a", "b"):
        files[f"{name}.safetensors"] = files[name].rename(files[name].with_suffix(".safetensors"))
    return {
        "bomb deep annotations": lambda: read_coco(files["deep.json"], data),
        "bomb huge numbers": lambda: read_coco(files["huge.json"], data),
        "bomb png": lambda: read_image(files["bomb.png"]),
        "bomb png header": lambda: image_size(files["bomb.png"]),
        "bomb header weights": lambda: read_weights(files["a.safetensors"]),
        "bomb header card": lambda: read_card(files["a.safetensors"]),
        "bomb tensor weights": lambda: read_weights(files["b.safetensors"]),
        "bomb tensor detector": lambda: load_detector(files["b.safetensors"], torch.device("cpu")),
        "bomb zip": lambda: read_weights(files["zip.pth"]),
        "bomb deep results": program("eval", f"detections={files['deep.json']}", "data=coco", f"data.root={data}",
                                     f"output={OWN / 'results'}"),
    }  # fmt: skip


def names(data: Path) -> dict[str, Callable[[], object]]:
    """A data set whose classes and images are called so, through training, evaluation and inference."""
    root = FOLDER / "named"
    write_shapes(root, num_train=4, num_val=2, image_size=[64, 96])
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        known = [category["id"] for category in document["categories"]]
        spare = max(known) + 1
        ids = [*known, *range(spare, spare + len(hostile.NAMES) - len(known))]
        document["categories"] = [{"id": i, "name": name} for i, name in zip(ids, hostile.NAMES, strict=True)]
        for image, name in zip(document["images"], hostile.NAMES, strict=False):
            storable = name.replace("/", "_") + ".jpg"
            (root / split / image["file_name"]).rename(root / split / storable)
            image["file_name"] = storable
        file.write_text(json.dumps(document))
    run, out = OWN / "runs" / "named", OWN / "named_out"
    return {
        "name train": program("train", *train_words("named", root)),
        "name eval": program("eval", f"checkpoint={run}", "device=cpu", "score_threshold=0"),
        "name infer": program("infer", f"checkpoint={run}", f"source={root / 'val'}", f"output={out}", "device=cpu",
                              "score_threshold=0"),
    }  # fmt: skip


def controls() -> dict[str, Callable[[], object]]:
    """What must be seen, or the watch is blind. (Everything here is harmless.)"""
    import pickle
    import socket

    canary = FOLDER / "CANARY_control"
    return {
        "control pickle": lambda: pickle.loads(hostile.as_pickle(hostile.call("os.system", f"touch {canary}"))),
        "control write": lambda: (FOLDER / "elsewhere").write_text("x"),
        "control folder": lambda: (FOLDER / "elsewhere_folder").mkdir(),
        "control exec": lambda: exec(f"x = {str(canary)!r}"),
        "control network": lambda: socket.getaddrinfo("127.0.0.1", 9),
    }


def listening() -> list[str]:
    """Ports that this process listens on."""
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]


def out_of_time(*_: object) -> None:
    raise TimeoutError


def everything() -> set[tuple[str, str]]:
    """What lies in FOLDER, apart from OWN, and what is in it."""
    files = {file for file in FOLDER.rglob("*") if not file.is_relative_to(OWN) and file.is_file()}
    return {(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


def main() -> None:
    signal.signal(signal.SIGALRM, out_of_time)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    torch.set_num_threads(1)
    OWN.mkdir(exist_ok=True)
    os.chdir(OWN)
    matplotlib.font_manager.findfont("DejaVu Sans")
    (FOLDER / "run_me.py").write_text(f"open({str(FOLDER / hostile.CANARY)!r}, 'w').close()\n")
    data = tiny.write_tiny_data(FOLDER / "tiny" / "data")
    run = tiny.write_tiny_run(FOLDER / "tiny" / "runs" / "tiny", data)
    cases = pickles() | configs(data, run) | cards(run) | paths(data, run) | bombs(data, run) | names(data)
    for name in ("train", "eval", "infer"):
        importlib.import_module(f"retina.cli.{name}")
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    before = everything()
    observed = {name: observe(name, do) for name, do in cases.items()}
    ports, changed = listening(), sorted(before ^ everything())
    observed |= {name: observe(name, do) for name, do in controls().items()}
    report = {"cases": observed, "seen": seen, "changed": changed, "ports": ports}
    (FOLDER / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
