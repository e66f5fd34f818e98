"""What becomes of experiments that are killed: python -m benchmarks.kills [--kills 70] [--seed 0].

A small project (`benchmarks.small`) is run once without harm. Then it is run from nothing, killed at a random moment
of a stage, and the same command is given again, until it ends; and all of that again until there have been as many kills.
Stages take turns. Each run is one of ``attack.py reproduce``: training, leave-one-out targets, extraction of the bank, attacks,
queries, tables, pictures and report. Root's runs also go through full disks: small ones in memory, which grow after each error.

Written to ``kills.csv``: stage (where the signal met it), seconds (since the run's beginning), resumed (whether nothing that
had been finished before was made again), equal (whether settings, rows and tables were the undisturbed run's to the last digit
in the end), signal.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

import attack
from benchmarks import small
from benchmarks.forks import Fork
from benchmarks.mutations import Answer, evaluated, reported
from lightning_advknn.experiment.device import provenance
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.storage import write_json

COLUMNS = ("stage", "seconds", "resumed", "equal", "signal")
ARGS = ("reproduce", "--config", small.GRID)
LIMIT = 300.0  # seconds that a run may take

# Functions of which the process is in one, by stage; the first that fits.
_STAGES = {
    "saving": ("save_tensors", "atomic_path", "save_checkpoint"),
    "targets": ("leave_one_out_votes",),
    "extraction": ("build_banks",),
    "surrogate training": ("surrogate",),
    "backbone training": ("fit",),
    "attack": ("perturb",),
    "query": ("observe", "calibrate"),
    "report": ("write_report", "draw", "write_csv", "_publish", "report_grid"),
}


def stage_of(functions: set[str]) -> str:
    """What a process is at."""
    for stage, names in _STAGES.items():
        if not functions.isdisjoint(names):
            return stage
    return "start"


def trial(
    home: Path, logs: Path, right: Answer, random: Random, counts: Counter[str], left: int
) -> list[Any]:
    """Lines of the kills, at most so many, of a project that runs from nothing to its end.

    Args:
        home: The project, never run.
        logs: For what runs write.
        right: What the undisturbed run found.
        random: Chooses moments.
        counts: Kills so far by stage.
        left: How many may follow.
    """
    lines: list[dict[str, Any]] = []
    while True:
        before = _finished(home)
        run = Fork(attack.main, ARGS, home, logs, watched=True)
        wanted = min(_STAGES, key=lambda stage: (counts[stage], random.random()))
        ending = random.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT])
        line = _strike(run, wanted, ending, random) if len(lines) < left else None
        outcome = run.wait(LIMIT)
        if lines:
            lines[-1]["resumed"] = all(_finished(home).get(file) == made for file, made in before.items())
        if line is None or outcome.code == 0:
            break
        counts[line["stage"]] += 1
        lines.append(line)
    equal = outcome.code == 0 and (evaluated(home), reported(home)) == right
    if not equal:
        sys.stdout.write(f"exit code {outcome.code}: {outcome.errors}\n")
    return [{**line, "equal": equal} for line in lines]


def fill(home: Path, logs: Path, right: Answer, random: Random) -> list[Any]:
    """Lines of runs that a full disk ended: the project on a small one, which grows a little after each.

    Args:
        home: Empty folder, on which a file system in memory is mounted.
        logs: For what runs write.
        right: What the undisturbed run found.
        random: Chooses by how much it grows.
    """
    lines: list[dict[str, Any]] = []
    used = 1024 * _kib(home)
    while True:
        used += random.randrange(2**20, 2**23)
        _mount(f"remount,size={used}", home)
        before = _finished(home)
        run = Fork(attack.main, ARGS, home, logs, watched=True)
        stage = "start"
        while run.alive and run.seconds < LIMIT:
            now = stage_of(run.functions())
            stage = stage if now == "start" else now  # as while it tells what is wrong
            time.sleep(0.01)
        outcome = run.wait(LIMIT)
        if lines:
            lines[-1]["resumed"] = all(_finished(home).get(file) == made for file, made in before.items())
        if outcome.code == 0:
            break
        told = "error:" in outcome.errors and "Traceback" not in outcome.errors
        if not told or "No space left" not in outcome.errors:
            sys.stdout.write(f"exit code {outcome.code}: {outcome.errors}\n")
        ending = "ENOSPC" if told else "ENOSPC, not told"
        lines.append({"stage": stage, "seconds": round(outcome.seconds, 3), "signal": ending})
    equal = (evaluated(home), reported(home)) == right
    return [{**line, "equal": equal} for line in lines]


def _mount(options: str, folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def _kib(folder: Path) -> int:
    """What a file system holds."""
    return shutil.disk_usage(folder).used // 1024


def _strike(run: Fork, wanted: str, ending: signal.Signals, random: Random) -> dict[str, Any] | None:
    """Send a signal at some moment of a stage; None if the run ended before."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and run.alive:
        if stage_of(run.functions()) == wanted:
            time.sleep(random.random() ** 2 * (0.01 if wanted == "saving" else 1.0))
            stage, seconds = stage_of(run.functions()), run.seconds
            if run.send(ending):
                return {"stage": stage, "seconds": round(seconds, 3), "signal": ending.name}
        time.sleep(0.005 * random.random())
    return None


def _finished(home: Path) -> dict[str, int]:
    """Files that a stage left behind, and when."""
    files = [path for path in home.glob("runs/cache/**/*") if path.suffix in (".safetensors", ".ckpt")]
    whole = [path for path in files if not path.name.startswith(".") and "unfinished" not in str(path)]
    return {str(path.relative_to(home)): path.stat().st_mtime_ns for path in whole}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a run did not go on, or came to something else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=70, help="How many; %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments; %(default)s.")
    parser.add_argument(
        "--disk", choices=("full", "enough"), default="full", help="Whether disks run full, too; %(default)s."
    )
    parser.add_argument("--output", default="results/reliability", help="Folder; %(default)s.")
    given = parser.parse_args(args)
    random = Random(given.seed)  # noqa: S311  # chooses, and guards nothing
    lines: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        untouched, logs = Path(folder) / "untouched", Path(folder) / "logs"
        untouched.mkdir()
        small.write_project(untouched, epochs=4)
        home = Path(folder) / "project"
        shutil.copytree(untouched, home)
        outcome = Fork(attack.main, ARGS, home, logs).wait(LIMIT)
        if outcome.code:
            raise RuntimeError(f"Expected the undisturbed project to run, but: {outcome.errors}")
        right = evaluated(home), reported(home)
        progress = tqdm(total=given.kills, desc="kills", disable=None)
        while len(lines) < given.kills:
            shutil.rmtree(home)
            shutil.copytree(untouched, home)
            found = trial(home, logs, right, random, counts, min(12, given.kills - len(lines)))
            lines += found
            progress.update(len(found))
        if given.disk == "full" and os.geteuid() == 0:
            shutil.rmtree(home)
            home.mkdir()
            _mount("size=64m", home)
            try:
                shutil.copytree(untouched, home, dirs_exist_ok=True)
                lines += fill(home, logs, right, random)
            finally:
                subprocess.run(["umount", str(home)], check=True)
        elif given.disk == "full":
            sys.stdout.write("Full disks are left out: only root may mount small ones.\n")
    write_csv(Path(given.output) / "kills.csv", COLUMNS, lines)
    command = shlex.join(["python", "-m", "benchmarks.kills", *(sys.argv[1:] if args is None else args)])
    write_json(Path(given.output) / "kills.json", {"command": command, **provenance(torch.device("cpu"))})
    good = sum(line["resumed"] and line["equal"] for line in lines)
    sys.stdout.write(f"{good} of {len(lines)} runs went on and came to equal results: {dict(counts)}\n")
    return 0 if good == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
