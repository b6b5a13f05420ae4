"""The output folder of an inference: what is done is known after any kill, and nothing of the user's is touched."""

import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altered import change, paths
from commands import digest
from faults import refused
from retina.cli.journal import (
    FAILED_TITLE,
    Batch,
    Done,
    already_done,
    cut_batches,
    finish,
    note,
    open_journal,
    open_output,
    put,
    read_done,
)
from retina.cli.outputs import final_files
from retina.cli.sources import Source, name_sources
from retina.errors import ConfigError


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / f"{name}.jpg" for name in "abcdefg"]
    for file in files:
        file.write_text(file.name)
    return name_sources(tmp_path / "in", files)


def keys(sources: list[Source], batch_size: int = 2, **settings: Any) -> list[str]:
    return [batch.key for batch in cut_batches(sources, batch_size, settings)]


def test_batches_are_cut_in_order(sources: list[Source]) -> None:
    batches = cut_batches(sources, 3, {})
    assert [[source.name[0] for source in batch.sources] for batch in batches] == [[*"abc"], [*"def"], ["g"]]
    assert len({batch.key for batch in batches}) == 3


def test_a_key_is_of_all_that_matters_to_its_batch_and_of_nothing_else(sources: list[Source]) -> None:
    before = keys(sources, threshold=0.3)
    assert keys(sources, threshold=0.3) == before
    assert not set(keys(sources, threshold=0.4)) & set(before)
    assert not set(keys(sources, 3, threshold=0.3)[:2]) & set(before)
    assert keys(sources[:-1], threshold=0.3) == before[:-1]
    renamed = [sources[0], sources[1]._replace(picture="other.jpg"), *sources[2:]]
    assert [a == b for a, b in zip(keys(renamed, threshold=0.3), before, strict=True)] == [False, True, True, True]
    status = sources[6].file.stat()
    os.utime(sources[6].file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert [a == b for a, b in zip(keys(sources, threshold=0.3), before, strict=True)] == [True, True, True, False]
    sources[2].file.unlink()
    assert [a == b for a, b in zip(keys(sources, threshold=0.3), before, strict=True)] == [True, False, True, False]


def done(batch: Batch) -> Done:
    found = {"width": 3, "height": 2, "boxes": [[0.1, 1 / 3, 2.0, 1.0]], "scores": [0.5], "labels": [0]}
    records = [{"file_name": source.name, **found, "picture": source.picture} for source in batch.sources]
    return Done(batch.key, records, [f"{source.name}: \udcff odd" for source in batch.sources])


def test_a_journal_cut_off_anywhere_tells_of_the_batches_before(sources: list[Source], tmp_path: Path) -> None:
    output = tmp_path / "out"
    batches = cut_batches(sources, 3, {})
    results = {batch.key: done(batch) for batch in batches}
    with open_output(output, []):
        for source in sources:
            put(output, source.picture, b"picture")
        with open_journal(output, 0) as journal:
            for one in results.values():
                note(journal, one)
        assert read_done(output, 1) == results
        file = output / ".infer" / "0.jsonl"
        whole = file.read_bytes()
        begin = whole.index(batches[2].key.encode())
        for length in range(begin, len(whole) - 1, 7):
            file.write_bytes(whole[:length])
            assert list(read_done(output, 1)) == [batch.key for batch in batches[:2]]
            with open_journal(output, 0) as journal:
                note(journal, results[batches[2].key])
            assert read_done(output, 1) == results
        file.write_bytes(whole[: begin // 2])
        with open_journal(output, 1) as journal:  # another process's
            note(journal, results[batches[2].key])
        assert batches[2].key in read_done(output, 1)
        (output / "g.jpg").unlink()
        assert batches[2].key not in read_done(output, 1)


@pytest.mark.parametrize("damage", [('"key": ', '"key": "x", "key": '), ("0.1", "NaN")])
def test_a_batch_whose_record_is_no_sound_json_is_done_again(
    sources: list[Source], tmp_path: Path, damage: tuple[str, str]
) -> None:
    output = tmp_path / "out"
    batches = cut_batches(sources, 3, {})
    with open_output(output, []):
        for source in sources:
            put(output, source.picture, b"picture")
        with open_journal(output, 0) as journal:
            for batch in batches:
                note(journal, done(batch))
        file = output / ".infer" / "0.jsonl"
        file.write_text(file.read_text().replace(*damage, 1))
        assert list(read_done(output, 1)) == [batch.key for batch in batches[1:]]


def test_changed_journals_are_done_again_or_refused(sources: list[Source], tmp_path: Path) -> None:
    """One or two values of the journal, the claims and the detections of an earlier inference are others'."""
    output, generator, outcomes = tmp_path / "out", random.Random(0), Counter[str]()
    (batch,) = cut_batches(sources, 9, {})
    claims: dict[str, list[str]] = {source.picture: [] for source in sources}
    with open_output(output, []), open_journal(output, 0) as journal:
        for source in sources:
            put(output, source.picture, b"picture")
        note(journal, done(batch))
        put(output, ".infer/claims.json", json.dumps(claims).encode())
        put(output, "inference.json", json.dumps({"files": claims}).encode())
    files = [output / ".infer" / "0.jsonl", output / ".infer" / "claims.json", output / "inference.json"]
    sound = [file.read_bytes() for file in files]
    for number in range(150):
        for file, content in zip(files, sound, strict=True):
            changed = [json.loads(content)]
            for _ in range(1 + number % 2):
                change(changed, generator.choice([*paths(changed), (0,)]), generator)
            file.write_text("\n".join(map(json.dumps, changed)))
        try:
            with open_output(output, [source.picture for source in sources]):
                for key, one in already_done([batch], output, 1).items():
                    outcomes["believed" if key == batch.key else "of others"] += 1
                    assert all(isinstance(fault, str) for fault in one.faults)
                    numbered = [{"id": number, **record} for number, record in enumerate(one.records)]
                    assert dict(final_files(numbered, ["thing"], [1], ["yolo", "coco"]))
        except ConfigError as fault:
            outcomes[fault.code] += 1
        assert all((output / source.picture).read_bytes() == b"picture" for source in sources)
    assert outcomes["output-taken"] > 10, outcomes
    assert outcomes["believed"] > 10, outcomes


def test_an_output_is_clean_at_the_end_and_the_users_files_stay(sources: list[Source], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / ".infer").mkdir(parents=True)  # all that a kill left
    (output / ".infer" / "0f.tmp").write_text("half a picture")
    (output / ".infer" / "mine.txt").write_text("mine")
    always = [".infer/mine.txt", "a.jpg", "detections.json"]
    for faults, files in [
        (["b.jpg: broken"], [*always, "failed.txt", "inference.json"]),
        ([], [*always, "inference.json"]),
    ]:
        with open_output(output, ["a.jpg"]):
            assert not list((output / ".infer").glob("*.tmp"))
            put(output, "a.jpg", b"picture")
            finish(output, [("detections.json", b"[]")], {"classes": ["thing"]}, faults)
        assert sorted(digest(output)) == files
        assert (output / "detections.json").read_bytes() == b"[]"
        assert json.loads((output / "inference.json").read_text()) == {"classes": ["thing"], "files": {"a.jpg": []}}
        if faults:
            assert (output / "failed.txt").read_text() == f"{FAILED_TITLE}\nb.jpg: broken\n"


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / ".infer").mkdir()
    put(tmp_path, "sub/a.jpg", b"old")
    with (tmp_path / "sub" / "a.jpg").open("rb") as old:
        put(tmp_path, "sub/a.jpg", b"new")
        assert old.read() == b"old", "who reads it meanwhile sees the old file to its end"
    assert (tmp_path / "sub" / "a.jpg").read_bytes() == b"new"
    (tmp_path / "sub" / "b.jpg").mkdir()
    with pytest.raises(OSError, match=r"b\.jpg"):
        put(tmp_path, "sub/b.jpg", b"new")
    assert list((tmp_path / ".infer").iterdir()) == []


def opened(output: Path, *pictures: str) -> None:
    with open_output(output, pictures):
        pass


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "inference.json").write_text('{"files": {"a.gif.jpg": []}}')
    for name in ("a.gif.jpg", "b.jpg"):
        (output / name).write_text("picture")
    with open_output(output, ["a.gif.jpg", "c.jpg"]):
        pass
    with refused("output-taken", "output: ", "b.jpg"):
        opened(output, "a.gif.jpg", "b.jpg")
    (tmp_path / "elsewhere").mkdir()
    (output / "sub").symlink_to("../elsewhere")
    for folder in ("sub", "sub/deep"):
        with refused("output-outside", "output: ", f"{output}/{folder} "):
            opened(output, f"{folder}/x.jpg")
    for name in ("detections.json", "classes.txt", ".INFER", "failed.txt"):
        with refused("reserved-name", "source: ", name.lower()):
            opened(output, f"{name}/x.jpg")
    (output / "failed.txt").write_text("my notes")
    with refused("output-taken", "output: ", "failed.txt"):
        opened(output, "c.jpg")
    (output / "failed.txt").unlink()
    (output / "loop").symlink_to("loop")
    with refused("output-taken", "loop"):
        opened(output, "loop/x.jpg", "loop")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "{", '{"files": ["a.jpg"]}', '{"files": {"a.jpg": 3}}', '{"files": {"a.jpg": [], "a.jpg": []}}'],
)
def test_odd_records_of_an_earlier_inference(tmp_path: Path, content: str) -> None:
    (tmp_path / "inference.json").write_text(content)
    (tmp_path / "a.jpg").write_text("mine")
    with refused("output-taken", "output: ", tmp_path):
        opened(tmp_path, "a.jpg")


def test_labels_that_somebody_has_corrected_are_not_overwritten(tmp_path: Path) -> None:
    output, label = tmp_path / "out", "labels/a.txt"
    for content in (b"0 .5 .5 .1 .1\n", b"0 .6 .5 .1 .1\n"):  # an inference of other settings replaces its own labels
        with open_output(output, [label]):
            finish(output, [(label, content), ("coco.json", content), ("counts.csv", content)], {}, [])
        assert (output / label).read_bytes() == content
    for name, refuses in (("counts.csv", False), (label, True), ("coco.json", True)):
        before = (output / name).read_bytes()
        (output / name).write_bytes(b"mine")
        if refuses:
            with refused("output-taken", "output: ", name):
                opened(output, label)
            assert (output / name).read_bytes() == b"mine"
        else:
            opened(output, label)
        (output / name).write_bytes(before)
    opened(output, label)


def test_labels_that_a_kill_left_are_the_inferences_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, labels = tmp_path / "out", [f"labels/{name}.txt" for name in "abc"]
    for content in (b"old", b"new"):
        for stop in (1, 2, 3, None):
            with open_output(output, labels):
                files = [(label, content) for label in labels]
                if stop is None:
                    finish(output, files, {}, [])
                    continue
                monkeypatch.setattr("retina.cli.journal.put", stopping(stop + 1))
                with pytest.raises(KeyboardInterrupt):
                    finish(output, files, {}, [])
                monkeypatch.undo()
    assert [(output / label).read_bytes() for label in labels] == [b"new"] * 3


def stopping(number: int) -> Callable[..., str]:
    """`put` that is interrupted before its call of that number."""
    calls = iter(range(number - 1))

    def interrupted(*arguments: Any) -> str:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return put(*arguments)

    return interrupted


def _open(output: Path) -> None:
    with refused("in-use", "output: ", output):
        opened(output, "a.jpg")


def test_two_inferences_do_not_write_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for expected in (0, 1):
        process = context.Process(target=_open, args=(tmp_path,))
        if expected == 0:
            with open_output(tmp_path, ["a.jpg"]):
                process.start()
                process.join()
        else:
            process.start()
            process.join()
        assert process.exitcode == expected
