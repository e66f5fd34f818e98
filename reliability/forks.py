"""Runs of a script in forks of this process, which save the time of its imports."""

import mmap
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

Main = Callable[[list[str]], int]
"""Takes command-line arguments and returns an exit code."""


class Exit(NamedTuple):
    """How a run ended."""

    code: int | None
    """Exit code; minus the signal that killed it; None if it was still running at its time limit."""
    errors: str
    """Its stderr."""
    seconds: float


class Fork:
    """A run in a child process; the constructor starts it.

    Args:
        main: The function to run.
        args: Its command-line arguments.
        folder: Its working directory.
        logs: Folder for its ``stdout`` and ``stderr``, outside of `folder`.
        watched: Whether to record which `functions` are running.
    """

    def __init__(
        self, main: Main, args: Sequence[str], folder: Path, logs: Path, *, watched: bool = False
    ) -> None:
        self._started = time.monotonic()
        self._logs = logs
        self._ended: int | None = None
        logs.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (logs / name).write_bytes(b"")
        sys.stdout.flush()
        sys.stderr.flush()
        self._seen = mmap.mmap(-1, 2**16)  # shared with the child
        self.pid = os.fork()
        if self.pid == 0:
            _become(main, list(args), folder, logs, self._seen if watched else None)

    def functions(self) -> set[str]:
        """Names of the Python functions on its main thread's stack, some milliseconds ago."""
        length = int.from_bytes(self._seen[:4], "little")
        return set(self._seen[4 : 4 + length].decode(errors="replace").split())

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the run has ended."""
        if not self.alive:
            return False
        os.kill(self.pid, number)
        return True

    @property
    def alive(self) -> bool:
        """Whether the run has not ended."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended is None

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def wait(self, limit: float) -> Exit:
        """Wait until the run ends, and kill it after `limit` seconds."""
        until = time.monotonic() + limit
        while self.alive and time.monotonic() < until:
            time.sleep(0.005)
        late = self.send(signal.SIGKILL)
        while self.alive:
            time.sleep(0.005)
        errors = (self._logs / "stderr").read_text(errors="replace")
        return Exit(None if late else self._ended, errors, self.seconds)


def _become(main: Main, args: list[str], folder: Path, logs: Path, seen: mmap.mmap | None) -> None:
    """Turn this process, a fork, into a run; it ends here."""
    code = 1
    try:
        for name, stream in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_APPEND), stream)
            setattr(sys, name, os.fdopen(stream, "w", closefd=False))  # the parent may have replaced it
        warnings.simplefilter("default")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if seen:
            _record_functions(seen)
        os.chdir(folder)
        sys.argv = ["attack.py", *args]
        torch.set_num_threads(1)
        code = main(args)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # print what Python would print at exit
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _record_functions(seen: mmap.mmap) -> None:
    """Write the functions on this process's stack to shared memory, every 5 milliseconds."""

    def write(number: int, frame: FrameType | None) -> None:
        names = []
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        text = " ".join(dict.fromkeys(names)).encode()[: 2**15]
        seen[: 4 + len(text)] = len(text).to_bytes(4, "little") + text

    signal.signal(signal.SIGALRM, write)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
