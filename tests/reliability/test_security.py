"""Nothing in a file is ever run, followed out of its folder or believed about its size; nothing is said to the network.

One process is fed the whole corpus of `hostile.py` under the eyes of `watched.py`; the tests here read its report."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest

from retina.errors import RetinaError, plain

ROOT = Path(__file__).parents[2]
WATCHED = Path(__file__).with_name("watched.py")


def isolated() -> list[str]:
    """The words that start a program without any network, where this machine lets us."""
    words = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if allowed else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    own = folder / "own"
    (own / "tmp").mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    environment |= {"HOME": str(own), "TMPDIR": str(own / "tmp"), "OMP_NUM_THREADS": "1", "LEAK": "leaked"}
    command = [*isolated(), sys.executable, str(WATCHED), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def cases(report: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: seen for name, seen in report["cases"].items() if name.startswith(f"{kind} ")}


def complaint(seen: dict[str, Any]) -> str:
    """The one line in which a case was refused."""
    if seen["fault"] is not None:
        assert not seen["fault"].startswith("TRACEBACK"), seen["fault"]
        return str(seen["fault"])
    assert seen["result"] == 2, seen
    lines = [line for line in seen["err"].splitlines() if line.startswith("error")]
    assert len(lines) == 1, seen["err"]
    assert "Traceback" not in seen["err"]
    return str(lines[0])


def test_every_hostile_pickle_would_do_its_work_if_it_were_unpickled(tmp_path: Path) -> None:
    class ReachedError(Exception):
        pass

    class Spy(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise ReachedError

    payloads = hostile.payloads(tmp_path)
    assert len(payloads) >= 30
    for opcodes in payloads.values():
        with pytest.raises(ReachedError):
            Spy(io.BytesIO(hostile.as_pickle(opcodes))).load()


def test_the_watch_sees(report: dict[str, Any]) -> None:
    events = {(case, event) for case, event, _ in report["seen"]}
    assert ("control pickle", "pickle.find_class") in events
    assert ("control pickle", "os.system") in events
    assert ("control write", "open") in events
    assert ("control folder", "os.mkdir") in events
    assert ("control exec", "compile") in events
    assert ("control network", "socket.getaddrinfo") in events
    assert ("control path", "open") in events
    assert report["cases"]["control path"]["fault"] is None


def test_nothing_was_run_read_or_written(report: dict[str, Any]) -> None:
    assert [entry for entry in report["seen"] if not entry[0].startswith("control ")] == []
    assert report["changed"] == []
    assert report["ports"] == []


@pytest.mark.parametrize("kind", ["pickle", "config", "card", "path", "bomb"])
def test_every_case_is_refused_in_one_harmless_line(
    report: dict[str, Any], kind: str, record_property: Callable[[str, object], None]
) -> None:
    found = cases(report, kind)
    record_property("tried", len(found))
    assert len(found) >= {"pickle": 150, "config": 10, "card": 5, "path": 12, "bomb": 5}[kind]
    ignored = {"config prepare in a run", "config limits in a run"}  # what a run must not decide is not read from it
    for name, seen in found.items():
        if name in ignored:
            assert seen["result"] == 0, (name, seen)
            continue
        line = complaint(seen)
        assert plain(line) == line, name
        assert " - " in line, (name, line)


def test_no_bomb_goes_off(report: dict[str, Any]) -> None:
    for name, seen in report["cases"].items():
        if not name.startswith("name "):
            assert seen["megabytes"] < 500, name


def test_settings_of_a_run_are_not_resolved(report: dict[str, Any]) -> None:
    seen = report["cases"]["config environment in a run"]
    assert "${oc.env:LEAK}" in seen["err"]
    assert "leaked" not in json.dumps(seen)


def test_hostile_names_are_shown_as_text(report: dict[str, Any], folder: Path) -> None:
    """Through training, evaluation and inference: the screen, the logs, the records, the pictures, the weights."""
    found = cases(report, "name")
    assert {name: seen["result"] for name, seen in found.items()} == dict.fromkeys(found, 0), found
    run, out = folder / "own" / "runs" / "named", folder / "own" / "named_out"
    texts = {name: seen["out"] + seen["err"] for name, seen in found.items()}
    texts |= {str(file): file.read_text() for file in (run / "log.txt", run / "config.yaml")}
    records = [*run.rglob("*.json"), *run.rglob("*.jsonl"), *out.rglob("*.json")]
    assert len(records) >= 5
    texts |= {str(file): file.read_text() for file in records}
    for where, text in texts.items():
        for line in text.splitlines():
            assert plain(line) == line, (where, line)
            assert not line.startswith("error: forged"), where
    classes = json.loads((run / "eval" / "metrics.json").read_text())["per_class"]
    assert set(classes) == set(hostile.NAMES)  # kept as they are where they are data
    written = [*run.rglob("*"), *out.rglob("*")]
    assert all(file.resolve().is_relative_to(folder / "own") for file in written)
    assert not list(folder.rglob("escaped*"))
    assert len(list((run / "eval" / "pictures").iterdir())) == 2
    assert len(list(out.rglob("*.jpg"))) == 2


def test_training_evaluation_and_inference_need_no_network(report: dict[str, Any]) -> None:
    if not isolated():
        pytest.skip("`unshare --map-root-user --net true` is not permitted here; socket events were still watched")
    assert {seen["result"] for seen in cases(report, "name").values()} == {0}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "kot \u00e9 \u65e5\u672c\u3000\u8a9e \U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e \u2265\xa0a\u0301",
            None,
        ),
        ("", None),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://x\x07y", r"\x1b]8;;http://x\x07y"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\u200b\ufeff\u00ad", r"\u200b\ufeff\xad"),
        ("\udc80\ud800", r"\udc80\ud800"),
        ("\0\x7f\x85", r"\x00\x7f\x85"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_plain(text: str, shown: str | None) -> None:
    assert plain(text) == (text if shown is None else shown)
    assert plain(plain(text)) == plain(text)
    assert str(RetinaError(text)) == plain(text)
    plain(text).encode()


# ---- what the source may not contain

BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "pty", "runpy",
    "code", "codeop", "commands", "webbrowser", "xmlrpc", "telnetlib", "http", "ftplib", "requests", "imp",
}  # fmt: skip
BANNED_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
BANNED_ATTRIBUTES = {
    "system", "popen", "execv", "execve", "execvp", "spawnv", "spawnl", "posix_spawn", "startfile",
    "unsafe_load", "full_load", "load_state_dict_from_url", "get_state_dict", "extractall", "urlopen", "urlretrieve",
    "all_gather_object", "broadcast_object_list", "gather_object",
}  # fmt: skip
PLAIN_LOADERS = {"yaml.BaseLoader", "yaml.SafeLoader"}


def dangers(source: str) -> Iterator[str]:
    """What in a module could run something from a file."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    plain_loaders = PLAIN_LOADERS | {c.name for c in classes if {ast.unparse(b) for b in c.bases} & PLAIN_LOADERS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]:
                if name.split(".")[0] in BANNED_MODULES or name == "urllib.request":
                    yield f"line {node.lineno}: imports {name}"
        elif isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BANNED_NAMES:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called.endswith("torch.load") and given.get("weights_only") != "True":
                yield f"line {node.lineno}: {called} without weights_only=True"
            if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: {called} with pickles"
            if called in ("yaml.load", "yaml.load_all") and given.get("Loader") not in plain_loaders:
                yield f"line {node.lineno}: {called} with a loader that makes objects"
            if called.endswith(("hub.load", "jit.load", "import_module")):
                yield f"line {node.lineno}: {called}"


KNOWN = (
    # an unpickler that makes arrays and nothing else, and the name of what it raises
    "retina/interop/read.py: imports pickle",
    "retina/interop/restricted_pickle.py: imports pickle",
    # modules of allowed packages: checked before the import
    "retina/plugins.py: importlib.import_module",
    # modules that the line before has found in a list
    "retina/cli/lab.py: importlib.import_module",
    "retina/cli/main.py: importlib.import_module",
    "tools/benchmark.py: importlib.import_module",
    "tools/benchmarks/launches.py: importlib.import_module",
    # the function that docs/adapters.md shows, to measure what is shown
    "tools/benchmarks/large_images.py: compile",
    "tools/benchmarks/large_images.py: exec",
    # what the same process has packed a moment before; never a file
    "retina/data/packed_records.py: imports marshal",
    # public names, listed in the packages themselves
    "retina/_lazy.py: importlib.import_module",
    # asks git for the commit
    "retina/cli/environment.py: imports subprocess",
)


@pytest.mark.parametrize("part", ["retina", "tools"])
def test_the_source_has_no_way_to_run_what_is_in_a_file(part: str) -> None:
    files = sorted((ROOT / part).rglob("*.py"))
    assert len(files) >= 5
    found = [f"{file.relative_to(ROOT)}: {danger}" for file in files for danger in dangers(file.read_text())]
    found = [re.sub(r" line \d+:", "", line) for line in found]
    assert sorted(found) == sorted(line for line in KNOWN if line.startswith(f"{part}/"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from subprocess import run",
        "import urllib.request",
        "eval('1')",
        "exec('1')",
        "import os; os.system('x')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "torch.hub.load('a', 'b')",
        "torch.jit.load(f)",
        "weights.get_state_dict()",
        "importlib.import_module(x)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(dangers(source))
