"""A fork runs, ends at its time limit, and gets signals."""

import os
import signal
import sys
from pathlib import Path

import pytest

from reliability.forks import Fork

# Runs are forks of this process. No other thread holds a lock that they need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def _look_about(args: list[str]) -> int:
    sys.stderr.write(f"{args} in {Path.cwd().name}")
    while args == ["sleep"]:
        signal.pause()
    return len(args)


def test_a_fork_is_a_run(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = Fork(_look_about, ["a", "b", "c"], home, tmp_path).wait(20)
    assert (done.code, done.errors) == (3, "['a', 'b', 'c'] in home")
    late = Fork(_look_about, ["sleep"], home, tmp_path).wait(0.5)
    assert late.code is None
    killed = Fork(_look_about, ["sleep"], home, tmp_path, watched=True)
    while "_look_about" not in killed.functions():
        os.sched_yield()
    assert killed.send(signal.SIGTERM)
    assert killed.wait(20).code == -signal.SIGTERM
    assert not killed.send(signal.SIGTERM)
