"""The house plan, enforced: what may import what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# a module may import from its own room and from rooms of a higher number
ROOMS = {
    "__main__": 0,
    "cli": 0,
    "lab": 0,
    "engine": 1,
    "evaluation": 2,
    "inference": 2,
    "interop": 2,
    "model": 3,
    "data": 3,
    "losses": 3,
    "detections": 3,
    "visualize": 3,
    "tracking": 3,
    "ops": 4,
    "distributed": 4,
    "files": 4,
    "plugins": 4,
    "schema": 4,
    "types": 5,
    "errors": 5,
    "_lazy": 6,
}

# whose modules may import from each other: what a command of the lab needs of the command line, and the other way round
TOGETHER = {"cli", "lab", "__main__"}


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def library() -> list[Path]:
    files = sorted((ROOT / "retina").rglob("*.py"))
    assert len(files) > 20
    return files


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "retina" and len(parts) > 1 and parts[1] in ROOMS else None


def test_every_module_has_a_room() -> None:
    names = {file.relative_to(ROOT / "retina").parts[0].removesuffix(".py") for file in library()}
    assert names - {"__init__"} == set(ROOMS)


def test_imports_point_one_way() -> None:
    wrong = []
    for file in library():
        own = file.relative_to(ROOT / "retina").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in sorted({room_of(name) for name in imports_of(file)} - {None, own}):
            if {own, other} <= TOGETHER:
                continue
            if ROOMS[other] <= ROOMS[own]:  # type: ignore[index]
                wrong.append(f"{file.relative_to(ROOT)} imports retina.{other}")
    assert wrong == []


def test_hydra_is_known_to_the_command_line_only() -> None:
    inside = [f for f in library() if f.relative_to(ROOT / "retina").parts[0] not in TOGETHER]
    assert [str(f) for f in inside if {n.split(".")[0] for n in imports_of(f)} & {"hydra", "omegaconf"}] == []


def test_settings_and_the_package_are_light() -> None:
    code = "import sys, retina, retina.engine.config, retina.cli.run_folder; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_tests_mirror_the_folders() -> None:
    """Tests of a folder are in the folder of that name, and every folder with code has some."""
    ours = {f.parent.relative_to(ROOT / "retina") for f in library()} - {Path(".")}
    tested = {f.parent.relative_to(ROOT / "tests") for f in (ROOT / "tests").rglob("test_*.py")}
    beside = {Path(name) for name in (".", "reliability", "examples", "benchmarks")}
    assert tested - beside == ours


def test_no_machine_and_no_package_index_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = ["py" + "pi.org", "python" + "hosted", "/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"]
    wrong = []
    for name in tracked:
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".yaml", ""} and file.is_file():
            text = file.read_text(encoding="utf-8", errors="ignore")
            wrong += [f"{name}: {host}" for host in hosts if host in text]
    assert wrong == []


def test_the_update_can_be_read_without_the_rest() -> None:
    """`engine/step.py` and all the modules of the library that it imports, followed to the end."""
    files, waiting = set[Path](), ["retina.engine.step"]
    while waiting:
        file = ROOT / (waiting.pop().replace(".", "/") + ".py")
        if file.is_file() and file not in files:
            files.add(file)
            waiting += [name for name in imports_of(file) if name.startswith("retina.")]
    assert len(files) <= 8, sorted(map(str, files))


ROAD = (
    *("types.py", "detections.py", "ops/*.py", "losses/detection.py", "model/*.py", "engine/*.py"),
    *("data/annotations.py", "data/coco.py", "data/images.py", "data/transforms.py"),
    *("data/dataset.py", "data/sampler.py", "data/loader.py"),
    *("evaluation/evaluate.py", "evaluation/metrics.py", "evaluation/coco_matching.py"),
    *("cli/train.py", "cli/eval.py", "cli/infer.py"),
)
"""What everybody must know. A file of these folders that nobody needs to know says "Beside the road." in its first
lines."""


def is_beside_the_road(file: Path) -> bool:
    return "Beside the road." in " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())


def test_the_road_is_short() -> None:
    lengths: dict[str, int] = {}
    for pattern in ROAD:
        files = list((ROOT / "retina").glob(pattern))
        assert files, f"{pattern}: no such file, name it anew in ROAD"
        for file in files:
            if not is_beside_the_road(file):
                lengths[str(file.relative_to(ROOT))] = file.read_text().count("\n")
    assert sum(lengths.values()) <= 6000, lengths


def test_the_main_functions_are_short() -> None:
    """`main` of training and `fit`: the two hops from a command to the update."""
    for name, function, limit in (("cli/train.py", "main", 75), ("engine/loop.py", "fit", 80)):
        tree = ast.parse((ROOT / "retina" / name).read_text())
        (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
        assert node.end_lineno - node.lineno + 1 <= limit, function
        assert len(node.args.args + node.args.kwonlyargs) <= 9, function
