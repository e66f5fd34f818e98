"""Kill experiments at random moments: python -m reliability.kills [--kills 70] [--seed 0].

A small project (`reliability.small_project`) runs once undisturbed; this is the reference. Then it starts
from nothing, is killed at a random moment of a stage, and is started again until it ends. This repeats until
there have been enough kills; stages take turns. Each run is ``attack.py reproduce``: training, leave-one-out
targets, extraction of the bank, attacks, queries, tables, figures and report. For root, runs on full disks
follow: small file systems in memory, which grow after each error.

Columns of ``kills.csv``: stage (in which the signal arrived), seconds (since the run started), resumed
(whether the next run made no finished file again), equal (whether the final settings, rows and tables equal
the reference's to the last digit), signal.
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
from lightning_advknn.experiment.device import provenance
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.storage import write_json
from reliability import small_project
from reliability.answers import Answer, evaluated, reported
from reliability.forks import Fork

COLUMNS = ("stage", "seconds", "resumed", "equal", "signal")
ARGS = ("reproduce", "--config", small_project.GRID)
LIMIT = 300.0  # seconds until a run counts as hanging

# By stage, names of functions that run in it; of several running functions, the first stage here counts.
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
    """The stage of a process in which these functions run."""
    for stage, names in _STAGES.items():
        if not functions.isdisjoint(names):
            return stage
    return "start"


def trial(
    home: Path, logs: Path, reference: Answer, random: Random, counts: Counter[str], left: int
) -> list[Any]:
    """Run a project from nothing to its end, and kill it on the way; a record of each kill.

    Args:
        home: Folder of the project, never run.
        logs: Folder for output of runs.
        reference: The reference's answer.
        random: Chooses moments.
        counts: Kills so far by stage; updated.
        left: Largest number of kills.
    """
    records: list[dict[str, Any]] = []
    while True:
        before = _finished(home)
        run = Fork(attack.main, ARGS, home, logs, watched=True)
        wanted = min(_STAGES, key=lambda stage: (counts[stage], random.random()))
        ending = random.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT])
        record = _strike(run, wanted, ending, random) if len(records) < left else None
        ended = run.wait(LIMIT)
        if records:
            records[-1]["resumed"] = all(_finished(home).get(file) == made for file, made in before.items())
        if record is None or ended.code == 0:
            break
        counts[record["stage"]] += 1
        records.append(record)
    equal = ended.code == 0 and (evaluated(home), reported(home)) == reference
    if not equal:
        sys.stdout.write(f"exit code {ended.code}: {ended.errors}\n")
    return [{**record, "equal": equal} for record in records]


def full_disks(home: Path, logs: Path, reference: Answer, random: Random) -> list[Any]:
    """Run a project on a full file system, and grow that until the project ends; a record of each error.

    Args:
        home: Folder of the project, where a file system in memory is mounted.
        logs: Folder for output of runs.
        reference: The reference's answer.
        random: Chooses by how much the file system grows.
    """
    records: list[dict[str, Any]] = []
    used = shutil.disk_usage(home).used // 1024 * 1024
    while True:
        used += random.randrange(2**20, 2**23)
        _mount(f"remount,size={used}", home)
        before = _finished(home)
        run = Fork(attack.main, ARGS, home, logs, watched=True)
        stage = "start"
        while run.alive and run.seconds < LIMIT:
            now = stage_of(run.functions())
            stage = stage if now == "start" else now  # it prints its error outside of all stages
            time.sleep(0.01)
        ended = run.wait(LIMIT)
        if records:
            records[-1]["resumed"] = all(_finished(home).get(file) == made for file, made in before.items())
        if ended.code == 0:
            break
        told = "error:" in ended.errors and "Traceback" not in ended.errors
        if not told or "No space left" not in ended.errors:
            sys.stdout.write(f"exit code {ended.code}: {ended.errors}\n")
        ending = "ENOSPC" if told else "ENOSPC, not told"
        records.append({"stage": stage, "seconds": round(ended.seconds, 3), "signal": ending})
    equal = (evaluated(home), reported(home)) == reference
    return [{**record, "equal": equal} for record in records]


def _mount(options: str, folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def _strike(run: Fork, wanted: str, ending: signal.Signals, random: Random) -> dict[str, Any] | None:
    """Send a signal at a random moment of a stage; None if the run ends first."""
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
    """Finished files of the cache, with their times."""
    files = [path for path in home.glob("runs/cache/**/*") if path.suffix in (".safetensors", ".ckpt")]
    whole = [path for path in files if not path.name.startswith(".") and "unfinished" not in str(path)]
    return {str(path.relative_to(home)): path.stat().st_mtime_ns for path in whole}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a run did not resume or ended with another answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=70, help="Number of kills; %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random moments; %(default)s.")
    parser.add_argument(
        "--disk", choices=("full", "enough"), default="full", help="Whether to try full disks; %(default)s."
    )
    parser.add_argument("--output", default="results/reliability", help="Folder for results; %(default)s.")
    given = parser.parse_args(args)
    random = Random(given.seed)  # noqa: S311  # not for cryptography
    records: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        untouched, logs = Path(folder) / "untouched", Path(folder) / "logs"
        untouched.mkdir()
        small_project.write_project(untouched, epochs=4)
        home = Path(folder) / "project"
        shutil.copytree(untouched, home)
        ended = Fork(attack.main, ARGS, home, logs).wait(LIMIT)
        if ended.code:
            raise RuntimeError(f"Expected the undisturbed project to run, but: {ended.errors}")
        reference = evaluated(home), reported(home)
        progress = tqdm(total=given.kills, desc="kills", disable=None)
        while len(records) < given.kills:
            shutil.rmtree(home)
            shutil.copytree(untouched, home)
            found = trial(home, logs, reference, random, counts, min(12, given.kills - len(records)))
            records += found
            progress.update(len(found))
        if given.disk == "full" and os.geteuid() == 0:
            shutil.rmtree(home)
            home.mkdir()
            _mount("size=64m", home)
            try:
                shutil.copytree(untouched, home, dirs_exist_ok=True)
                records += full_disks(home, logs, reference, random)
            finally:
                subprocess.run(["umount", str(home)], check=True)
        elif given.disk == "full":
            sys.stdout.write("Full disks are skipped: only root may mount small file systems.\n")
    write_csv(Path(given.output) / "kills.csv", COLUMNS, records)
    command = shlex.join(["python", "-m", "reliability.kills", *(sys.argv[1:] if args is None else args)])
    write_json(Path(given.output) / "kills.json", {"command": command, **provenance(torch.device("cpu"))})
    good = sum(record["resumed"] and record["equal"] for record in records)
    sys.stdout.write(f"{good} of {len(records)} runs resumed and ended with equal results: {dict(counts)}\n")
    return 0 if good == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
