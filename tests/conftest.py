"""Shape and type annotations of the whole library are checked while its tests run; at run time they cost nothing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from jaxtyping import install_import_hook

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
ROOMS = (
    "data",
    "detections",
    "distributed",
    "engine",
    "errors",
    "evaluation",
    "files",
    "inference",
    "interop",
    "losses",
)
ROOMS += ("model", "ops", "printing", "report", "schema", "types", "visualize")
install_import_hook([f"retina.{room}" for room in ROOMS], "beartype.beartype")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side

from programs import run_ranks  # noqa: E402  # after the hook

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The blood-cell photographs in COCO format, where they are present."""
    root = SHARED / "data" / "bccd"
    if not root.is_dir():
        pytest.skip(f"blood-cell photographs are not at {root} (data/README.md says how to get them)")
    return root


@pytest.fixture(scope="session")
def metric_fixtures() -> Path:
    """Detection sets with known COCO numbers, where they are present."""
    root = SHARED / "fixtures"
    if not root.is_dir():
        pytest.skip(f"metric fixtures are not at {root}")
    return root


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """`load(name)`: the module of a program, tools/benchmark.py's too."""

    def load_tool(name: str) -> ModuleType:
        return importlib.import_module("benchmark" if name == "benchmark" else f"retina.cli.{name}")

    return load_tool


@pytest.fixture(scope="session")
def tool(load: Callable[[str], ModuleType]) -> Callable[..., int]:
    """`tool(name, *words)`: exit code of a tool called in this process."""

    def run(name: str, *words: object) -> int:
        with pytest.raises(SystemExit) as ended:
            load(name).main([str(word) for word in words])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """`start(*arguments, cwd=..., **environment)`: a new Python, where it matters what it imports; else `Program`."""

    def popen(*arguments: object, cwd: Path, **environment: object) -> subprocess.Popen[str]:
        settings = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "NO_ALBUMENTATIONS_UPDATE": 1, **environment}
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **{key: str(value) for key, value in settings.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_tiny_data  # not above: the process that only hands tests to others needs no torch

    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def trained_run(tiny_data: Path) -> Path:
    """A run folder that no test writes into."""
    from tiny import write_tiny_run

    return write_tiny_run(tiny_data.parent / "runs" / "tiny", tiny_data)


@pytest.fixture(scope="session")
def two_processes(trained_run: Path, tiny_data: Path) -> Path:
    """A folder with `eval/` and `infer/` as two processes together wrote them, with the environment torchrun sets.

    One of the six images in `photos/` is broken. `out.txt` and `err.txt` hold what rank 0 said."""
    folder = tiny_data.parent / "two"
    shutil.copytree(tiny_data / "val", folder / "photos")
    (folder / "photos" / "broken.jpg").write_bytes(b"")
    script = f"""
import os, runpy, sys
common = ["checkpoint={trained_run}", "batch_size=1", "device=cpu"]
for name, code, *words in [
    ("eval", 0, "output=eval", *common),
    ("infer", 3, "output=infer", "source=photos", *common),
]:
    sys.argv = [name, *words]
    os.environ["MASTER_PORT"] = os.environ[f"PORT_{{name}}"]  # a group of its own for each tool
    try:
        runpy.run_path(f"{ROOT}/tools/{{name}}.py", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == code, (name, ended.code)
"""
    main, other = run_ranks("-c", script, cwd=folder, ports=("PORT_eval", "PORT_infer"))
    assert [main.returncode, other.returncode] == [0, 0], (main, other)
    for file, text in (("out.txt", main.stdout), ("err.txt", main.stderr)):
        (folder / file).write_text(text)
    assert other.stdout == "", "only rank 0 speaks"
    return folder
