"""How a program stops: the first SIGTERM or Ctrl-C asks it to, where there is something to save; a second Ctrl-C
quits."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORWARDED_WITHIN = 1.0
"""Seconds within which a second signal is the first one again: torchrun passes on the Ctrl-C that the terminal has
already sent to the whole group."""
_END = 0
_LOOKS = 1.0
"""Seconds between two looks for signals that the kernel holds for a main thread which reads from a disk that does not
answer: such a read is interrupted by nothing except SIGKILL, and no handler runs."""


class StopRequest:
    """Within the `with` block, `signal()` is the first SIGINT or SIGTERM that the process was sent, or 0.

    Python runs handlers between its own instructions, and a process that waits for others in a collective runs none. So
    a thread listens at the other end of a pipe into which the interpreter's C handler writes (`set_wakeup_fd`), and a
    second Ctrl-C ends the process with status 130 whatever it is doing. Main thread only.

    quits: whether there is nothing to save, so that the first one ends the process, too."""

    def __init__(self, quits: Callable[[], bool] = lambda: False) -> None:
        self._first, self._quits = 0, quits

    def signal(self) -> int:
        return self._first

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write, bytes([_END]))  # its end alone would not do, because forked loader workers hold it open
        self._listener.join()
        os.close(self._write)
        os.close(self._read)

    def _handle(self, number: int, _: object) -> None:
        if self._quits():  # the listener does not run any more while Python shuts down
            quit_at_once(number)

    def _listen(self) -> None:
        if hasattr(signal, "sigtimedwait"):  # not on macOS and Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of this thread, which then may take those that are held
        since = 0.0
        while _END not in (numbers := self._arrived()):
            for number in set(numbers) & set(SIGNALS):  # others that have a handler (SIGCHLD) write here too
                if self._quits():
                    quit_at_once(number)
                if not self._first:
                    self._first, since = number, time.monotonic()
                elif number == signal.SIGINT and time.monotonic() - since > FORWARDED_WITHIN:
                    quit_at_once(number)

    def _arrived(self) -> bytes:
        """Numbers of signals, or `_END`."""
        if not hasattr(signal, "sigtimedwait") or select.select([self._read], [], [], _LOOKS)[0]:
            return os.read(self._read, 64)
        held = signal.sigtimedwait(SIGNALS, 0)
        return bytes([held.si_signo]) if held else b""


def _leave_the_pipe() -> None:
    """A forked process that is sent a signal must not tell the one it comes from."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_pipe)


def quit_at_once(number: int) -> None:
    """Ends the process with status 128 + `number`. Nothing needs undoing: all on disk is whole at any instant."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # progress bars hide the cursor
    os._exit(128 + number)
