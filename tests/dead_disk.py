"""A disk that answers everything except reads: whoever reads waits for ever, as for a server that went away.

It is a file system in user space; its protocol is Linux's include/uapi/linux/fuse.h."""

import errno
import os
import signal
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from children import checked, in_child, libc, own_mounts

NAME = "image.png"
_FORGET, _READ = 2, 15
_ROOT, _FILE = 1, 2


def on_dead_disk(folder: Path, task: Callable[[], object], when_stuck: Callable[[int], object]) -> int:
    """`in_child` with such a disk at `folder`, which only the child sees and which holds one file, `NAME`. `when_stuck`
    gets the process id of the child, once it reads. Skips where that is forbidden."""
    refused = folder / "refused"

    def mounted() -> None:
        try:
            own_mounts()
            device = os.open("/dev/fuse", os.O_RDWR)
            options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
            checked(libc.mount(b"none", bytes(folder), b"fuse", 0, options.encode()))
        except OSError as fault:
            refused.write_text(str(fault))
            return
        child = os.getpid()
        if os.fork() == 0:
            signal_at_parents_end = 1
            libc.prctl(signal_at_parents_end, signal.SIGKILL)
            _serve(device, lambda: when_stuck(child))
        os.close(device)
        task()

    status = in_child(mounted)
    if refused.exists():
        pytest.skip(f"no file system of one's own can be mounted here: {refused.read_text()}")
    return status


def _serve(device: int, when_stuck: Callable[[], object]) -> None:
    attributes = {node: _attributes(node, mode) for node, mode in ((_ROOT, stat.S_IFDIR), (_FILE, stat.S_IFREG))}
    opened, killable = bytes(16), 1  # reads are asynchronous, so that what kills the reader need not wait for them
    while request := os.read(device, 1 << 17):
        _, code, unique, node = struct.unpack_from("IIQQ", request)
        if code == _READ:
            when_stuck()
        if code in (_READ, _FORGET):
            continue
        answers = {
            1: struct.pack("QQQQII", _FILE, 0, 1000, 1000, 0, 0) + attributes[_FILE],  # of a name
            3: struct.pack("QII", 1000, 0, 0) + attributes.get(node, b""),
            14: opened,
            18: b"",  # released
            25: b"",  # closed
            26: struct.pack("4I2H2I2H8I", 7, 31, 0, killable, 0, 0, 1 << 16, 1, 0, 0, *[0] * 8),  # the first of all
        }
        known = code in answers and (code != 1 or request[40:].rstrip(b"\0") == NAME.encode())
        answer = answers[code] if known else b""
        fault = 0 if known else -errno.ENOENT if code == 1 else -errno.ENOSYS
        os.write(device, struct.pack("IiQ", 16 + len(answer), fault, unique) + answer)


def _attributes(node: int, mode: int) -> bytes:
    return struct.pack("6Q10I", node, 1 << 20, 1 << 11, 0, 0, 0, 0, 0, 0, mode | 0o755, 1, 0, 0, 0, 4096, 0)
