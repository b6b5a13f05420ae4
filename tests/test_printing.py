"""Lines reach the screen harmless, whatever it can show and whoever still reads."""

import ast
import io
import os
import sys
from pathlib import Path

import pytest

from children import in_child
from retina.errors import ConfigError
from retina.printing import BROKEN_PIPE, quiet_end, say

ROOT = Path(__file__).parents[1]
NAME = "caf\u00e9 \x1b[31m\u202e\n\x1b]0;x\x07 \u732b"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "caf\u00e9 \\x1b[31m\\u202e\\n\\x1b]0;x\\x07 \u732b"),
        ("latin-1", "caf\u00e9 \\x1b[31m\\u202e\\n\\x1b]0;x\\x07 \\u732b"),
        ("ascii", "caf\\xe9 \\x1b[31m\\u202e\\n\\x1b]0;x\\x07 \\u732b"),
    ],
)
def test_each_text_is_one_harmless_line_in_any_encoding(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, error in (("stdout", False), ("stderr", True)):
        written = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding))
        say(NAME, "next", error=error)
        assert written.getvalue().decode(encoding) == f"{shown}\nnext\n"


def test_the_text_of_a_fault_is_one_harmless_line() -> None:
    """Also for programs that catch it and print it themselves."""
    assert str(ConfigError("no \x1b[31mfile\n", key="data.\u202eroot")) == "data.\\u202eroot: no \\x1b[31mfile\\n"


@pytest.mark.parametrize("number", [1, 2])
def test_a_reader_who_has_gone_ends_a_program_without_a_word(number: int, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)

    def task() -> None:
        os.dup2(os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT), 3 - number)
        os.dup2(writing, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        with pytest.raises(SystemExit) as ended, quiet_end():
            say("unread", error=number == 2)
        assert ended.value.code == BROKEN_PIPE
        say("goes nowhere", error=number == 2)

    assert in_child(task) == 0
    assert (tmp_path / "other").read_bytes() == b""
    os.close(writing)


def test_streams_that_are_closed_lead_nowhere(tmp_path: Path) -> None:
    """As with `>&-`: the next file to be opened must not get the number of one."""

    def task() -> None:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.close(number)
            setattr(sys, name, None)
        with quiet_end(), (tmp_path / "mine").open("w"):
            os.write(1, b"of a library in C")
            print("of another package")
            say("of ours", error=True)

    assert in_child(task) == 0
    assert (tmp_path / "mine").read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_what_is_printed_is_one_line(tmp_path: Path) -> None:
    def task() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        with pytest.raises(SystemExit) as ended, quiet_end():
            say("help")
        assert ended.value.code == 2
        os.dup2(full, 2)
        say("an error that finds no room either", error=True)

    assert in_child(task) == 0
    assert (tmp_path / "err").read_text().startswith("error: stdout: No space left on device - ")


def test_what_others_print_ends_as_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def task() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        sys.stdout = open(1, "w", closefd=False, encoding="ascii")  # noqa: SIM115
        with pytest.raises(SystemExit) as ended, quiet_end():
            print(NAME)
        assert ended.value.code == BROKEN_PIPE

    assert in_child(task) == 0


def test_nothing_else_prints() -> None:
    files = [*(ROOT / "retina").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    others = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"))
    ]
    assert others == []
