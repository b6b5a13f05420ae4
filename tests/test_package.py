"""The wheel is installed into an environment of its own and used from a folder that knows no checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
TINY = ("train.length=1", "train.eval_every=1", "train.pictures=0", "train.device=cpu")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`installed(program, *words)`: runs a program of the environment, in an empty folder outside the checkout."""
    base = tmp_path_factory.mktemp("package")
    source, environment, folder = base / "source", base / "environment", base / "folder"
    folder.mkdir()
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("retina", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    settings |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def python(*words: str, cwd: Path) -> None:
        done = subprocess.run([sys.executable, *words], cwd=cwd, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    python("-c", f"from setuptools import build_meta; build_meta.build_wheel({str(base)!r})", cwd=source)
    (wheel,) = base.glob("*.whl")
    python("-m", "venv", "--without-pip", str(environment), cwd=base)
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python("-m", "pip", "--python", str(environment / "bin" / "python"), "install", *options, str(wheel), cwd=base)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    shutil.rmtree(source)

    def run(program: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / program), *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=1000)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    return run


def test_the_installed_package_is_the_one_in_use(installed: Command) -> None:
    code = "import retina, retina.cli.compose as c; print(retina.__file__); print(c.CONFIGS / 'train.yaml')"
    module, config = installed("python", "-c", code).stdout.splitlines()
    assert "site-packages/retina/" in module
    assert str(ROOT) not in module
    assert Path(config).is_file()
    assert Path(config).parents[1] == Path(module).parent
    (version,) = installed("retina", "--version").stdout.split()
    code = "from importlib.metadata import version; print(version('retina-detect'))"
    assert installed("python", "-c", code).stdout.strip() == version


def test_every_module_and_every_config_is_in_the_wheel(installed: Command) -> None:
    code = (
        "import pathlib, retina; root = pathlib.Path(retina.__file__).parent;"
        "print('\\n'.join(str(f.relative_to(root)) for f in root.rglob('*') if f.suffix in ('.py', '.yaml')))"
    )
    modules = {str(file.relative_to(ROOT / "retina")) for file in (ROOT / "retina").rglob("*.py")}
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert set(installed("python", "-c", code).stdout.split()) == modules | configs


def test_the_weights_that_come_along_are_installed(installed: Command) -> None:
    code = "import retina; detector = retina.load('shapes', device='cpu'); print(detector.file, *detector.classes)"
    file, *classes = installed("python", "-c", code).stdout.split()
    assert "site-packages/retina/weights/" in file
    assert "circle" in classes


COMMANDS = """
import sys
from retina.cli.main import main
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit as ended:
        assert ended.code == 0, (command, ended.code)
"""


def test_every_command_works_away_from_the_checkout(installed: Command) -> None:
    words = "checkpoint=runs/smoke device=cpu"
    commands = [
        f"train experiment=smoke {' '.join(TINY)}",
        f"eval {words} pictures=0",
        f"infer {words} source=data/shapes_smoke/val output=out",
        "doctor data=coco data.root=data/shapes_smoke",
        f"train -m experiment=smoke name=swept optimizer.lr=0.001,0.002 {' '.join(TINY)}",
    ]
    said = installed("python", "-c", COMMANDS, *commands).stdout  # one Python, because each has to load torch
    assert "finished at step 1" in said
    assert "AP" in said
    code = (
        "import glob, json; print(len(json.load(open('out/inference.json'))['images']));"
        "files = glob.glob('runs/swept*/**/config.yaml', recursive=True);"
        "print(*(open(file).read() for file in files), sep='---\\n')"
    )
    detections, configs = installed("python", "-c", code).stdout.split("\n", 1)
    assert int(detections) == 8
    assert sorted(run["optimizer"]["lr"] for run in yaml.safe_load_all(configs)) == [0.001, 0.002]


def test_the_package_is_a_command_itself(installed: Command) -> None:
    assert "import-weights" in installed("python", "-m", "retina", "--help").stdout
