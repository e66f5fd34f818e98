"""Damage files and settings: python -m reliability.mutations [--kinds config idx] [--seed 0].

A small project (`reliability.small_project`) runs once. Then each of its files is damaged in many ways
(`reliability.mutants`), one at a time in a copy of the project, and the same command runs again. Two outcomes
are good: an error message without traceback (exit code 2, or 1 after long work has begun), or the right
answer: equal settings give equal numbers, to the last digit, and other settings are recorded. Bad outcomes
are a traceback, a crash, a hang, and other numbers under equal settings.

Columns of ``mutations.csv``: kind, mutation, expected, outcome, ok.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from lightning_advknn.experiment.device import provenance
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.storage import write_json
from reliability import small_project
from reliability.answers import Answer
from reliability.forks import Exit, Fork
from reliability.mutation_plan import ERROR, KINDS, PLAN, RIGHT, Mutation

LIMIT = 300.0  # seconds until a run counts as hanging
COLUMNS = ("kind", "mutation", "expected", "outcome", "ok")


def prepare(
    home: Path, logs: Path, kinds: set[str], random: Random
) -> tuple[list[Mutation], dict[str, Answer]]:
    """Run the undamaged project.

    Args:
        home: Empty folder for the project.
        logs: Folder for output of runs.
        kinds: Kinds of files to damage.
        random: Chooses bits and values.

    Returns:
        All mutations of these kinds, and the right answer of each command.
    """
    small_project.write_project(home)
    mutations: list[Mutation] = []
    right = {}
    for command, make, kinds_of_it in PLAN:
        if kinds & kinds_of_it:
            ended = Fork(command.main, command.args, home, logs).wait(600)
            if ended.code:
                raise RuntimeError(
                    f"Expected the undamaged project to run, but {command.name}: {ended.errors}"
                )
            right[command.name] = command.read(home)
            for made in (home / "runs").iterdir():
                if made.name != "cache":
                    shutil.rmtree(made)
            mutations += [mutation for mutation in make(home, random) if mutation.kind in kinds]
    return mutations, right


def judge(ended: Exit, answer: Answer | None, right: Answer, harmed: bool) -> tuple[str, bool]:
    """Describe an outcome, and say whether it is good."""
    lines = ended.errors.strip().splitlines()
    last = lines[-1][:300] if lines else "nothing said"
    if harmed:
        return "code of the file was run", False
    if ended.code is None:
        return f"still running after {LIMIT:.0f} s", False
    if ended.code < 0:
        return f"killed by signal {-ended.code}", False
    if "Traceback (most recent call last)" in ended.errors:
        return f"traceback: {last}", False
    if ended.code:
        error = next((line for line in reversed(lines) if "error:" in line), "")
        return f"exit code {ended.code}, {error[:300] or last}", ended.code <= 2 and bool(error)
    if answer is None:
        return "nothing to read", False
    if answer == right:
        return "right answer", True
    return ("right answer, to other settings", True) if answer[0] != right[0] else ("other numbers", False)


def run(mutation: Mutation, home: Path, right: Answer) -> tuple[Any, ...]:
    """Run a mutation; its row in the results."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "project"
        shutil.copytree(home, place)
        if mutation.kind != "results":
            shutil.rmtree(place / "results", ignore_errors=True)
        for made in (place / "runs").iterdir():
            if made.name != "cache":
                shutil.rmtree(made)
        file = place / mutation.file
        file.unlink()
        if mutation.mutant.content is ...:
            file.mkdir()
        elif mutation.mutant.content is not None:
            file.write_bytes(mutation.mutant.content)
        ended = Fork(mutation.command.main, mutation.command.args, place, Path(folder) / "logs").wait(LIMIT)
        answer = None
        if ended.code == 0:
            try:
                answer = mutation.command.read(place)
            except (ValueError, OSError, KeyError):
                answer = None
        words, good = judge(ended, answer, right, any(place.rglob("harmed")))
    words = words.replace(str(place), "").replace(str(home), "")
    if mutation.expected == ERROR and not words.startswith("exit code"):
        good = False
    if mutation.expected == RIGHT and words != RIGHT:
        good = False
    return mutation.kind, f"{mutation.file}: {mutation.mutant.name}", mutation.expected, words, good


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if an outcome is bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="Kinds of files; all.")
    parser.add_argument("--only", type=int, help="Number of mutations of each kind, drawn at random; all.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of bits, values and mutations; %(default)s."
    )
    parser.add_argument("--output", default="results/reliability", help="Folder for results; %(default)s.")
    given = parser.parse_args(args)
    random = Random(given.seed)  # noqa: S311  # not for cryptography
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "project"
        home.mkdir()
        chosen, right = prepare(home, Path(folder) / "logs", set(given.kinds), random)
        if given.only:
            of_kinds = [[mutation for mutation in chosen if mutation.kind == kind] for kind in given.kinds]
            chosen = [each for some in of_kinds for each in random.sample(some, min(given.only, len(some)))]
        records = []
        for mutation in tqdm(chosen, desc="mutations", disable=None):
            found = run(mutation, home, right[mutation.command.name])
            records.append(dict(zip(COLUMNS, found, strict=True)))
            if not records[-1]["ok"]:
                tqdm.write(": ".join(found[:2] + found[3:4]), file=sys.stdout)
                sys.stdout.flush()
    write_csv(Path(given.output) / "mutations.csv", COLUMNS, records)
    command = shlex.join(["python", "-m", "reliability.mutations", *(sys.argv[1:] if args is None else args)])
    write_json(Path(given.output) / "mutations.json", {"command": command, **provenance(torch.device("cpu"))})
    good = sum(record["ok"] for record in records)
    sys.stdout.write(f"{good} of {len(records)} outcomes are good\n")
    return 0 if good == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
