"""A valid data set with one thing wrong: the doctor names file, record and fix in one line, and changes nothing."""

import functools
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import CASES, HEIGHT, WIDTH, Data, Json, document, write_valid

from retina.data.checks import DataReport
from retina.data.coco import Annotations, read_coco
from retina.errors import RetinaError


@functools.cache
def doctor() -> Callable[[list[str]], None]:
    import doctor as tool

    return tool.main


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_valid(tmp_path_factory.mktemp("valid") / "data")


@pytest.fixture
def data(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """A copy of the valid data set; the working directory is outside of it."""
    for file in valid.rglob("*.*"):
        copy = tmp_path / "data" / file.relative_to(valid)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return Data(tmp_path / "data")


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything under a folder: kind, size, time of change, link or content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(state.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ino, content)
    return found


def examine(root: Path, *overrides: str) -> tuple[int, Json]:
    """Exit code and report of the doctor."""
    with pytest.raises(SystemExit) as ended:
        doctor()([f"data.root={root}", *overrides])
    return ended.value.code, json.loads(Path("data_report.json").read_text())


def test_the_valid_data_set_is_healthy(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(data.root) == (0, {**examine(data.root)[1], "faults": [], "warnings": [], "healthy": True})
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "healthy, 0 warnings - all in data_report.json"


@pytest.mark.parametrize("name", CASES)
def test_one_mutation_is_one_line(data: Data, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = CASES[name]
    spoilt.spoil(data)
    before = tree(data.root)
    code, report = examine(data.root, *spoilt.overrides)
    assert tree(data.root) == before
    lines = [*report["faults"], *report["warnings"]]
    assert len(lines) == 1, lines
    assert (code, len(report["faults"])) == ((2, 1) if spoilt.exit_code else (0, 0))
    out, err = capsys.readouterr()
    assert err == ""
    assert "Traceback" not in out
    (line,) = [line for line in out.splitlines() if all(part in line for part in spoilt.parts)]
    assert " - " in line
    assert line.isprintable()
    assert str(data.root) in line or spoilt.overrides


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [a.update(id=0) for a in content["annotations"][:1]],
        lambda content: [a.pop("id") for a in content["annotations"]],
        lambda content: [a.update(iscrowd=None, area=None) for a in content["annotations"]],
        lambda content: [a.update(iscrowd=False, area=7) for a in content["annotations"]],
        lambda content: [a.update(segmentation=[[], {"counts": "\0"}, 7]) for a in content["annotations"]],
        lambda content: (
            [c.update(id=c["id"] - 1) for c in content["categories"]]
            + [a.update(category_id=a["category_id"] - 1) for a in content["annotations"]]
        ),
        lambda content: content["images"].reverse(),
        lambda content: content.update(info={"year": "soon"}, licenses=None),
        lambda content: (
            [image.update(width=float(WIDTH), id=-image["id"]) for image in content["images"]]
            + [a.update(image_id=-a["image_id"]) for a in content["annotations"]]
        ),
        lambda content: content["annotations"][3].update(bbox=[-0.5, 0, WIDTH + 1, HEIGHT + 0.75]),
    ],
)
def test_what_does_no_harm_is_not_spoken_of(data: Data, change: Callable[[Json], object]) -> None:
    for file in (data.file, data.val_file):
        data.edit(change, file=file)
    code, report = examine(data.root)
    assert (code, report["faults"], report["warnings"]) == (0, [], [])


def test_many_faults_of_one_kind_leave_the_screen_readable(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: Json) -> None:
        content["annotations"] += [{"image_id": 1, "category_id": 1, "bbox": [5, 5, -1, k]} for k in range(5_000)]
        content["annotations"][0]["bbox"] = None
        content["images"][1]["file_name"] = "\x1b[31mred\n.jpg"

    data.edit(change)
    code, report = examine(data.root, "decode=false")
    assert (code, len(report["faults"])) == (2, 5_002)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert all(line.isprintable() for line in lines)
    assert any("more like it)" in line for line in lines)
    assert any("bbox None" in line for line in lines)
    assert any(r"\x1b[31mred\n.jpg" in line for line in lines)


def spoilt_documents() -> st.SearchStrategy[Json]:
    """A valid document in which some values, wherever they stand, are replaced, removed or repeated."""
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=10**18, max_value=10**40),
        st.floats(),
        st.text(max_size=8),
        st.lists(st.floats() | st.integers() | st.text(max_size=3), max_size=5),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    )

    @st.composite
    def spoilt(draw: st.DrawFn) -> Json:
        content = document(1, 3)
        for _ in range(draw(st.integers(1, 4))):
            holder: Json = content
            while True:
                keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                if not keys:
                    break
                key = draw(st.sampled_from(keys))
                inner = holder[key]
                if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 9)):
                    holder = inner
                    continue
                action = draw(st.sampled_from(["replace", "remove", "repeat"]))
                if action == "replace":
                    holder[key] = draw(odd)
                elif action == "remove":
                    del holder[key]
                elif isinstance(holder, list):
                    holder.append(inner)
                break
        return content

    return spoilt()


def attempt(file: Path, **options: Any) -> Annotations | None:
    """What could be read, or None after an error as it should be; another exception ends the test."""
    try:
        return read_coco(file, file.parent, **options)
    except RetinaError as fault:
        line = str(fault)
    assert line.startswith(f"{file}: ")
    assert " - " in line
    assert "\n" not in line
    return None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["images", "annotations", "categories", "id", "bbox"]) | st.text(max_size=3), inner
        )
    ),
    max_leaves=20,
)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=spoilt_documents() | ANY_JSON, skip=st.booleans(), outside=st.booleans())
def test_only_our_own_error_comes_out_of_any_json(tmp_path: Path, content: Json, skip: bool, outside: bool) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    report = DataReport()
    found = attempt(file, report=report, skip_faulty=skip, allow_outside=outside)
    if found is None:
        return
    assert skip or not report.faults
    assert np.isfinite(found.boxes).all()
    assert np.isfinite(found.areas).all()
    assert found.offsets[-1] == len(found.boxes) == len(found.labels) == len(found.crowd) == len(found.areas)
    assert [found.path(row).name for row in range(len(found))]


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), max_size=3))
def test_only_our_own_error_comes_out_of_any_bytes(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(json.dumps(document(1, 3)).encode())
    for position, mask in flips:
        data[position % len(data)] ^= mask
    file = tmp_path / "a.json"
    file.write_bytes(bytes(data[: cut if cut % 2 else None]))
    attempt(file, skip_faulty=bool(cut % 3))
