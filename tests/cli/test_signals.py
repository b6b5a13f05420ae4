"""Real signals to real processes; the children import no torch and start in a fraction of a second."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retina.cli.signals import SIGNALS, StopRequest

# A mutex that is locked twice: the main thread waits in C, where no Python handler runs and no signal wakes it.
STUCK = """
import ctypes, sys
from retina.cli.signals import StopRequest
mutex = ctypes.create_string_buffer(256)
with StopRequest(QUITS) as request:
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopRequest() as request:
        assert request.signal() == 0
        os.kill(os.getpid(), number)
        wait_for(request.signal)
        os.kill(os.getpid(), signal.SIGTERM)  # a repeated SIGTERM asks for nothing new
        assert request.signal() == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_other_signals_with_a_handler_are_no_request() -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert request.signal() == 0
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_second_interrupt_quits_though_the_process_waits_in_c() -> None:
    with child(STUCK.replace("QUITS", "")) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.25)
        process.send_signal(signal.SIGINT)  # the launcher's copy of the same Ctrl-C
        time.sleep(1.25)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_quits_where_there_is_nothing_to_save(number: signal.Signals) -> None:
    with child(STUCK.replace("QUITS", "lambda: True")) as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number


def test_a_signal_to_a_forked_process_is_none_to_its_parent() -> None:
    with StopRequest() as request:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(worker, 0)
        time.sleep(0.1)
        assert request.signal() == 0


def test_the_end_does_not_wait_for_forked_processes() -> None:
    read, write = os.pipe()
    with StopRequest():
        worker = os.fork()
        if worker == 0:  # holds all the descriptors of its parent until it is told to go
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    os.close(write)  # reached only if the listener has ended
    os.close(read)
    assert os.waitpid(worker, 0)[1] == 0
