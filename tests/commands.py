"""What tests of several tools say about commands and their traces."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def one_line(capsys: Capture) -> str:
    """The one line in which a tool refused, without the code of the fault, and that it said nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    begin = re.match(r"error(\[[a-z0-9-]+\])?: ", line)
    assert begin
    return f"error: {line[begin.end() :]}"


def refused_by_tool(capsys: Capture, code: str, *named: object) -> tuple[str, str]:
    """Stdout and stderr of a tool that ended in one line with that code, naming the key, file or record at fault."""
    out, err = capsys.readouterr()
    assert err.startswith(f"error[{code}]: "), err
    assert err.count("\n") == 1
    assert [name for name in named if str(name) not in err] == [], err
    return out, err


def digest(root: Path) -> dict[str, str]:
    """Hashes of all files under a folder, by name."""
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
