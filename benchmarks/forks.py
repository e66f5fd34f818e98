"""Runs of a script in processes that have imported everything already: many runs, each as good as a fresh one."""

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


class Outcome(NamedTuple):
    """How a run ended."""

    code: int | None
    """Exit code; minus the signal that killed it; None if it was still running at its time limit."""
    errors: str
    """What it wrote to stderr."""
    seconds: float


class Fork:
    """A run in a child process, which begins with its construction.

    Args:
        main: What runs.
        args: Its arguments.
        folder: Its working directory.
        logs: Where ``stdout`` and ``stderr`` go, outside of `folder`.
        watched: Whether `functions` is to be known.
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
        """Names of the Python functions that its main thread is in, as of some milliseconds ago."""
        length = int.from_bytes(self._seen[:4], "little")
        return set(self._seen[4 : 4 + length].decode(errors="replace").split())

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if it has ended already."""
        if not self.alive:
            return False
        os.kill(self.pid, number)
        return True

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended is None

    @property
    def seconds(self) -> float:
        """Since its beginning."""
        return time.monotonic() - self._started

    def wait(self, limit: float) -> Outcome:
        """How it ended; killed after so many seconds from now."""
        until = time.monotonic() + limit
        while self.alive and time.monotonic() < until:
            time.sleep(0.005)
        late = self.send(signal.SIGKILL)
        while self.alive:
            time.sleep(0.005)
        errors = (self._logs / "stderr").read_text(errors="replace")
        return Outcome(None if late else self._ended, errors, self.seconds)


def _become(main: Main, args: list[str], folder: Path, logs: Path, seen: mmap.mmap | None) -> None:
    code = 1
    try:
        for name, stream in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_APPEND), stream)
            setattr(sys, name, os.fdopen(stream, "w", closefd=False))  # whatever the parent had put there
        warnings.simplefilter("default")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if seen:
            _tell(seen)
        os.chdir(folder)
        sys.argv = ["attack.py", *args]
        torch.set_num_threads(1)
        code = main(args)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # whatever a process of its own would print at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(seen: mmap.mmap) -> None:
    """Have this process write down every few milliseconds which functions it is in."""

    def write(number: int, frame: FrameType | None) -> None:
        names = []
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        said = " ".join(dict.fromkeys(names)).encode()[: 2**15]
        seen[: 4 + len(said)] = len(said).to_bytes(4, "little") + said

    signal.signal(signal.SIGALRM, write)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
