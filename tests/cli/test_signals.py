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

from retina.cli.signals import FORWARDED_WITHIN, SIGNALS, StopRequest

# A mutex that is locked twice: the main thread waits in C, where no Python handler runs and no signal wakes it.
STUCK = """
import ctypes, sys
from retina.cli import signals
from retina.cli.signals import StopRequest
signals.FORWARDED_WITHIN = WITHIN
mutex = ctypes.create_string_buffer(256)
with StopRequest(QUITS) as request:
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def wait_for(condition: Callable[[], object], seconds: float = 1000.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def child(quits: str = "", within: float = 1.0) -> Iterator[subprocess.Popen[str]]:
    """Stuck; what `StopRequest` is given, and the seconds within which a second signal is the first one again."""
    code = STUCK.replace("QUITS", quits).replace("= WITHIN", f"= {within}")
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


def test_a_copy_of_an_interrupt_that_a_launcher_passes_on_is_the_first_one_again() -> None:
    with child(within=1000.0) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)  # two that wait to be delivered would be one
        assert process.poll() is None


def test_a_second_interrupt_quits_though_the_process_waits_in_c() -> None:
    with child(within=0.0) as process:
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            time.sleep(0.2)  # two that wait to be delivered would be one
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130


def test_the_launcher_s_copy_of_the_same_interrupt_does_not_quit() -> None:
    assert 0.5 <= FORWARDED_WITHIN <= 2  # a launcher's copy comes sooner than that, a person's second wish later
    with child(within=1000.0) as process:
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.poll() is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_quits_where_there_is_nothing_to_save(number: signal.Signals) -> None:
    with child("lambda: True") as process:
        process.send_signal(number)
        assert process.wait(timeout=1000) == 128 + number


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
