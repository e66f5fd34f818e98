"""Run one experiment in several processes: python -m reliability.concurrent_runs FOLDER STOP NAME..."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attack
from lightning_advknn.experiment import training
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.fill import _Filler

SECONDS = 300  # time limit, for a busy machine


def run_concurrently(folder: Path, stop: str, names: list[str]) -> list[int]:
    """Run the experiment ``attack.yaml`` of a folder in one process for each name; their exit codes.

    Each process writes its results to ``<name>``, its stderr to ``<name>.err``, and a line to ``made.txt``
    when it begins or ends a stage.

    Args:
        folder: Folder of the experiment.
        stop: The first process is killed (signal 9) in this stage, once all others wait for it; "" to kill
            none.
        names: Names of the processes.
    """
    until = time.monotonic() + SECONDS
    children = {name: _start(folder, stop, name, name == names[0]) for name in names}
    ends: dict[str, int] = {}
    while len(ends) < len(names) and time.monotonic() < until:
        time.sleep(0.05)
        for name, child in children.items():
            if name not in ends and (found := os.waitpid(child, os.WNOHANG))[0]:
                ends[name] = os.waitstatus_to_exitcode(found[1])
        waiting = [(folder / f"{name}.err").read_text().count(f"makes {stop}\n") for name in names[1:]]
        if stop and all(waiting) and names[0] not in ends:
            os.kill(children[names[0]], signal.SIGKILL)
    for name in children.keys() - ends.keys():
        os.kill(children[name], signal.SIGKILL)
    return [ends.get(name, -1) for name in names]


def _start(folder: Path, stop: str, name: str, first: bool) -> int:
    """Run the experiment in a fork of this process; its process id."""
    (folder / f"{name}.err").touch()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        for number, path in enumerate((os.devnull, f"{name}.err"), start=1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        _log(Path("made.txt"), name, stop, first)
        code = attack.main(
            [
                "evaluate",
                "--config=attack.yaml",
                "--device=cpu",
                f"--output={name}",
                f"--results=tables-{name}",
            ]
        )
    finally:
        os._exit(code)


def _log(file: Path, name: str, stop: str, first: bool) -> None:
    """Log the stages of this process, and let only the first process make the stage `stop`."""

    def say(*words: str) -> None:
        with file.open("a") as lines:
            lines.write(" ".join((name, *words)) + "\n")

    measured, take, fit = StageCache.measured, _Filler._take, training.fit

    def log_stage(self: StageCache, key: str, stage: str, make: Any) -> Any:
        say("begins", key)
        if first and stage == stop:
            time.sleep(SECONDS)
        result = measured(self, key, stage, make)
        say("ends", key)
        return result

    def late(self: _Filler, names: Any, stages: Any, locks: Any) -> Any:
        late = [name for name in names if stages[name].label == stop and not first]
        while any(f" begins {name}\n" not in file.read_text() for name in late):
            time.sleep(0.01)
        return take(self, names, stages, locks)

    def log_fit(cli: Any, trained: Any, checkpoint: Path, seed: int) -> None:
        say("begins", f"{checkpoint.parent.name}/{checkpoint.stem}")
        fit(cli, trained, checkpoint, seed)
        say("ends", f"{checkpoint.parent.name}/{checkpoint.stem}")

    StageCache.measured, _Filler._take = log_stage, late  # type: ignore[method-assign]
    training.fit = log_fit


def events(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The log of `run_concurrently`: process, ``begins`` or ``ends``, and stage; without banks."""
    for line in (folder / "made.txt").read_text().splitlines():
        name, verb, what = line.split()
        if not what.startswith("bank/"):  # each process holds its own in memory
            yield name, verb, what


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_concurrently(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
