import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from faults import refused
from retina import distributed


def test_one_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    tensor = torch.ones(2)
    assert distributed.all_reduce_sum(tensor) is tensor
    with distributed.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()


def test_devices() -> None:
    assert distributed.choose_device("cpu") == torch.device("cpu")
    assert distributed.choose_device().type in {"cpu", "cuda", "mps"}
    with pytest.raises(ValueError, match=r"does not exist - use auto"):
        distributed.choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"not available here - use device=cpu"):
            distributed.choose_device("cuda:0")


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group(torch.device("cpu")):
        assert distributed.all_reduce_sum(torch.tensor([1.0 + rank])).item() == 3
        assert distributed.gather_objects(f"rank {rank}") == ["rank 0", "rank 1"]
        assert distributed.broadcast_object(rank) == 0
        norm = nn.BatchNorm2d(2)
        norm.running_mean.fill_(float(rank))
        norm.running_var.fill_(2.0 + 2 * rank)
        norm.weight.data.fill_(float(rank))
        statistics = distributed.running_statistics(norm)
        distributed.average_into(statistics, distributed.flatten(statistics))
        assert norm.running_mean.tolist() == [0.5, 0.5]
        assert norm.running_var.tolist() == [3.0, 3.0]
        assert norm.weight.tolist() == [float(rank)] * 2
    assert not torch.distributed.is_initialized()
    Path(folder, f"done{rank}").touch()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done0", "done1"]


def _slow_rank(rank: int, port: int, gave_up: Path) -> None:
    """Rank 0 is at work until rank 1 has lost patience."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def work() -> None:
        while not gave_up.exists():
            time.sleep(0.05)

    with refused(*(("late-process", "rank 1: ", "timeout_minutes") if rank else ("lost-process", "rank 0: "))):
        try:
            with distributed.process_group(torch.device("cpu"), timeout_minutes=0.1):
                distributed.on_main(work)
        finally:
            gave_up.touch()


def test_a_process_that_waits_too_long_names_the_setting(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_slow_rank, (port, tmp_path / "gave up"), nprocs=2, start_method="fork")


def test_a_launcher_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        port = once.getsockname()[1]
    settings = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with (
        refused("lost-launcher", "rank 1: start", "Connection refused"),
        distributed.process_group(torch.device("cpu")),
    ):
        pass
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 0)  # this process does not end with its parent


@pytest.mark.parametrize("size", ["2", "", "two", "0", "-1"])
def test_a_world_size_that_was_left_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with refused("world-size", "WORLD_SIZE: ", repr(size)), distributed.process_group(torch.device("cpu")):
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_WORLD_SIZE", "1.5"), ("LOCAL_RANK", "9" * 400)],
)
def test_what_torchrun_sets_is_a_number(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, number in (group | {name: value}).items():
        monkeypatch.setenv(variable, number)
    with refused("world-size", name, value[:40]):
        if name.startswith("LOCAL"):
            distributed.launched_number(name)
        else:
            distributed.launched_world_size()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_says_whom_it_waits_for_and_a_signal_ends_it(number: signal.Signals) -> None:
    reading, writing = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def wait() -> None:
        os.environ.update(RANK="0", WORLD_SIZE="2", **place)
        sys.stderr = os.fdopen(writing, "w", buffering=1)
        signal.signal(number, lambda *_: None)  # runs too late: the process waits in C++ code
        with distributed.process_group(torch.device("cpu")):
            pass

    process = multiprocessing.get_context("fork").Process(target=wait, daemon=True)
    process.start()
    os.close(writing)
    with os.fdopen(reading) as told:
        line = told.readline()
    assert line.startswith(f"rank 0: waiting for rank 1 at 127.0.0.1:{place['MASTER_PORT']}"), line
    os.kill(process.pid or 0, number)
    process.join(1000)
    code = process.exitcode
    process.kill()
    assert code == -number
