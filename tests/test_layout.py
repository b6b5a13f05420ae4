"""The house plan, enforced: what may import what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]

# a module may import from its own room and from rooms of a higher number
ROOMS = {
    "__main__": 0,
    "cli": 0,
    "lab": 0,
    "engine": 1,
    "report": 1,
    "export": 1,
    "hub": 1,
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
    "precision": 4,
    "schema": 4,
    "types": 5,
    "printing": 5,
    "errors": 6,
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


WRITERS = {
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "tofile", "to_csv", "savez", "savez_compressed"),
    *("save_file", "copyfile", "copy2", "copytree", "NamedTemporaryFile", "mkstemp", "FileHandler", "memmap"),
    *("SummaryWriter", "savetxt", "imwrite"),
}
"""Calls that write to a path."""
INTO = {"save": 0, "savefig": 0, "dump": 1}
"""Calls that write to a path or into an open file, and which of their arguments that is."""
EXEMPT = {
    ("retina/lab/clock.py", "write_text"),  # tells the kernel something
    ("retina/printing.py", "open"),  # the null device
}


def last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def ways_to_write(code: str) -> set[str]:
    """The calls that write to a path; not those into memory, or into a file that `retina.files` has opened."""
    calls, opened = list[ast.Call](), set[str]()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            calls.append(node)
        made, name = (
            (node.value, node.targets[0])
            if isinstance(node, ast.Assign)
            else (node.context_expr, node.optional_vars)
            if isinstance(node, ast.withitem)
            else (None, None)
        )
        if isinstance(made, ast.Call) and last_name(made.func) in ("BytesIO", "open_plain") and name:
            opened.add(last_name(name))
    ways = set()
    for call in calls:
        name, of = last_name(call.func), last_name(getattr(call.func, "value", call))
        if name in WRITERS or (name in INTO and of and call.args[INTO[name] :][:1] and not _into(call, opened)):
            ways.add(name)
        if name in ("open", "fdopen") and of != "Image" and not (of == "av" and last_name(call.args[0]) in opened):
            is_method = bool(of) and of not in ("os", "io")
            modes = [*call.args[0 if is_method else 1 :][:1], *(k.value for k in call.keywords if k.arg == "mode")]
            letters = {str(mode.value) if isinstance(mode, ast.Constant) else "w" for mode in modes}
            if of == "os" or set("wax+") & set("".join(letters)):
                ways.add(name)
    return ways


def _into(call: ast.Call, opened: set[str]) -> bool:
    return last_name(call.args[INTO[last_name(call.func)]]) in opened


def test_files_are_written_in_one_place() -> None:
    """`retina/files.py`, which follows no planted link and waits for no pipe."""
    other = {
        (str(file.relative_to(ROOT)), way)
        for file in [*library(), *(ROOT / "tools").rglob("*.py")]
        if file != ROOT / "retina" / "files.py"
        for way in ways_to_write(file.read_text())
    }
    assert other == EXEMPT


def test_ways_to_write_are_seen() -> None:
    seen = {
        'open(file, "w")': "open",
        'open(file, mode="ab")': "open",
        "open(file, mode)": "open",
        'file.open("r+")': "open",
        "os.open(file, os.O_WRONLY)": "open",
        'os.fdopen(number, "w")': "fdopen",
        "file.write_text(text)": "write_text",
        "np.save(file, array)": "save",
        'image.save(folder / "a.jpg")': "save",
        "figure.savefig(output)": "savefig",
        'json.dump(values, file.open("w"))': "dump",
        'av.open(path, "w")': "open",
        "shutil.copyfile(a, b)": "copyfile",
        "folder.mkdir()": "mkdir",
    }
    assert [code for code, way in seen.items() if way not in ways_to_write(code)] == []
    harmless = ('open(file, "rb")', "file.open()", "Image.open(path)", "checkpointer.save()")
    harmless += (
        'content = io.BytesIO()\nimage.save(content, "PNG")',
        'with open_plain(f, "xb") as s:\n    np.save(s, a)',
        'with open_plain(f, "xb") as s, av.open(s, "w") as c:\n    pass',
    )
    assert [code for code in harmless if ways_to_write(code)] == []


def test_every_mutant_can_be_made() -> None:
    """`make mutants` takes long; this tells at once when the code that it breaks was changed."""
    sources = {file: (ROOT / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    assert [mutant.name for mutant in MUTANTS if sources[mutant.file].count(mutant.old) != 1] == []
