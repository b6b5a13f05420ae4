"""Python programs in processes of their own, forked from a server that has imported the libraries already: a new Python
spends five seconds of processor time on that, a fork nothing."""

import atexit
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["retina.cli.train", "retina.cli.eval", "retina.cli.infer", "retina.engine.loop"])


def _run(words: Sequence[str], cwd: str, environment: Mapping[str, str], files: Sequence[str]) -> None:
    """In the child: what Python does with `words`, FILE or `-c` TEXT first."""
    os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace")
    sys.argv = list(words[1:] if words[0] == "-c" else words)
    try:
        if words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Program:
    """A program that runs, with what tests use of `subprocess.Popen`. `output` is the file that gets what it says, by
    default one for each of the two streams."""

    def __init__(self, *words: object, cwd: Path, output: Path | None = None, **environment: object) -> None:
        folder = None if output else tempfile.mkdtemp()
        self._files = [str(output)] * 2 if output else [f"{folder}/{name}" for name in ("out", "err")]
        if folder:
            weakref.finalize(self, shutil.rmtree, folder)
        for file in self._files:
            Path(file).touch()  # there is something to read at once
        settings = os.environ | {key: str(value) for key, value in environment.items()}
        self._process = SERVER.Process(target=_run, args=([*map(str, words)], str(cwd), settings, self._files))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a program", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (Path(file).read_text() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def interpret(*words: object, cwd: Path) -> None:
    """A Python in which Triton interprets its kernels; a new one, because Triton decides that when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1000)
    if "only 0-dimensional arrays" in done.stderr and version("triton").startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4")
    assert done.returncode == 0, done.stderr


def run_ranks(
    *words: object, cwd: Path, ports: Sequence[str] = ("MASTER_PORT",), **environment: object
) -> list[subprocess.CompletedProcess[str]]:
    """A program as the two processes of one group, with the environment that torchrun sets; torchrun itself would start
    three new Pythons. Each variable in `ports` gets the number of a free port."""
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in ports}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        free = {name: one.getsockname()[1] for name, one in sockets.items()}
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", **free, **environment}
    programs = [Program(*words, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **group) for rank in range(2)]
    try:
        outputs = [program.communicate(timeout=1000) for program in programs]
    finally:
        for program in programs:
            program.kill()
    codes = [program.returncode or 0 for program in programs]
    return [subprocess.CompletedProcess(words, code, *said) for code, said in zip(codes, outputs, strict=True)]
