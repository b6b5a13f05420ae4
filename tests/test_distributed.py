import ctypes
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from retina import distributed
from retina.errors import RetinaError


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
    mp.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done0", "done1"]


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
        pytest.raises(RetinaError, match=r"^rank 1: start: torchrun is gone \(Connection refused\) - start it again$"),
        distributed.process_group(torch.device("cpu")),
    ):
        pass
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 0)  # this process does not end with its parent
