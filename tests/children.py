"""Faults that would take the tests down with them happen in a child process: forked, so that torch is there already."""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest


def in_child(task: Callable[[], object]) -> int:
    """0 when `task` returned, 1 when it raised (the traceback is on stderr), -n when signal n ended the child."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            task()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # whatever happens, the child must not go on with the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


FILE_CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}


def before_each_file_call(act: Callable[[int, str, tuple[object, ...]], object]) -> None:
    """Calls `act(number, event, arguments)` before every call to the file system from now on. It cannot be undone, so
    this is for children."""
    number = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal number
        if event in FILE_CALLS:
            number += 1
            act(number, event, arguments)

    sys.addaudithook(hook)


def die_at_file_call(fatal: int) -> None:
    """SIGKILL right before the call to the file system of that number, counted from 1."""
    before_each_file_call(lambda number, *_: number == fatal and os.kill(os.getpid(), signal.SIGKILL))


def on_small_disk(folder: Path, megabytes: int, task: Callable[[], object]) -> int:
    """`in_child` with a tmpfs at `folder` that only the child sees. Skips where that is forbidden."""
    refused = folder / "refused"

    def mounted() -> None:
        try:
            _mount(folder, megabytes)
        except OSError as fault:
            refused.write_text(str(fault))
            return
        task()

    status = in_child(mounted)
    if refused.exists():
        pytest.skip(f"no disk can be mounted in a namespace of one's own here: {refused.read_text()}")
    return status


def remount_read_only(folder: Path) -> None:
    """Within `on_small_disk`."""
    remount, read_only = 32, 1
    checked(libc.mount(b"none", bytes(folder), b"tmpfs", remount | read_only, None))


def _mount(folder: Path, megabytes: int) -> None:
    own_mounts()
    checked(libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={megabytes}m".encode()))


def own_mounts() -> None:
    """What this process mounts from now on, no other sees. Raises OSError where that is forbidden."""
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    user, group = os.getuid(), os.getgid()
    checked(libc.unshare(new_mounts | new_user))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    checked(libc.mount(b"none", b"/", None, private | recursive, None))


CALLS = {
    "x86_64": (0xC000003E, {"write": 1, "fcntl": 72, "fsync": 74, "ftruncate": 77}),
    "aarch64": (0xC00000B7, {"fcntl": 25, "ftruncate": 46, "write": 64, "fsync": 82}),
}
"""Linux's name of a processor for seccomp, and its numbers of system calls."""


def fail_calls(name: str, code: int, *, argument: int | None = None, value: int = 0) -> None:
    """From now on the kernel refuses that system call with the errno `code`, as a disk or a file system does; only
    where an argument has that value, if one is named. It cannot be undone, so this is for children."""
    architecture, numbers = CALLS[platform.machine()]
    load, equal, answer, allow = 0x20, 0x15, 0x06, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, allow)]
    lines += [(load, 0, 0, 0), (equal, 1, 0, numbers[name]), (answer, 0, 0, allow)]
    if argument is not None:
        lines += [(load, 0, 0, 16 + 8 * argument), (equal, 1, 0, value), (answer, 0, 0, allow)]
    lines += [(answer, 0, 0, 0x00050000 | code)]
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer)))
    no_new_privileges, seccomp, filtered = 38, 22, 2
    checked(libc.prctl(no_new_privileges, 1, 0, 0, 0))
    checked(libc.prctl(seccomp, filtered, header, 0, 0))


def with_failing_calls(task: Callable[[], object], name: str, code: int, **where: int) -> int:
    """`in_child` after `fail_calls`. Skips where the system has no such filters."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        pytest.skip("system calls are made to fail by Linux's seccomp, on x86-64 and arm64")
    if in_child(lambda: fail_calls("ftruncate", errno.EIO)):
        pytest.skip("seccomp is forbidden here")

    def filtered() -> None:
        fail_calls(name, code, **where)
        task()

    return in_child(filtered)


libc = ctypes.CDLL(None, use_errno=True)


def checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
