"""What tests of the command-line tools share. Most call a tool's `main` in this process, for a new one takes seconds to
load torch."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tiny import write_tiny_data, write_tiny_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"retina_tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tool() -> Callable[..., int]:
    """`tool(name, *words)`: exit code of a tool called in this process."""
    tools: dict[str, ModuleType] = {}

    def run(name: str, *words: object) -> int:
        if name not in tools:
            tools[name] = load_tool(name)
        with pytest.raises(SystemExit) as ended:
            tools[name].main([str(word) for word in words])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """`start(*arguments, cwd=..., **environment)`: Python in a process of its own."""

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
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def trained_run(tiny_data: Path) -> Path:
    """A run folder that no test writes into."""
    return write_tiny_run(tiny_data.parent / "runs" / "tiny", tiny_data)
