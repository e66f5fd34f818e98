"""Damage files and settings: python -m reliability.mutations [--kinds config idx] [--seed 0].

A small project (`reliability.small_project`) runs once. Then each of its files is damaged in many ways
(`reliability.mutants`), one at a time in a copy of the project, and the same command runs again. Two outcomes
are good: an error message without traceback (exit code 2, or 1 after long work has begun), or the right
answer: equal settings give equal numbers, to the last digit, and other settings are recorded. Bad outcomes
are a traceback, a crash, a hang, and other numbers under equal settings.

Columns of ``mutations.csv``: kind, mutation, expected, outcome, ok.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

import attack
from lightning_advknn.commands.train import main as train
from lightning_advknn.experiment.device import provenance
from lightning_advknn.reports.records.csv_files import read_csv, write_csv
from lightning_advknn.storage import write_json
from reliability import mutants, small_project
from reliability.forks import Exit, Fork, Main

LIMIT = 300.0  # seconds until a run counts as hanging
COLUMNS = ("kind", "mutation", "expected", "outcome", "ok")

Answer = tuple[Any, Any]
"""What a run recorded: its settings, and its numbers."""


class Command(NamedTuple):
    """A command to run on damaged files."""

    name: str
    main: Main
    args: tuple[str, ...]
    read: Callable[[Path], Answer]
    """Reads its answer from the project's folder."""


class Mutation(NamedTuple):
    """A damaged file of the project, and the command that reads it."""

    kind: str
    file: str
    mutant: mutants.Mutant
    command: Command
    expected: str


def evaluated(home: Path) -> Answer:
    """The answer of ``attack.py evaluate``: settings, metrics and rows."""
    summary = _json(_only(home, "summary.json"))
    rows = {str(p.relative_to(home)): read_csv(p) for p in sorted(home.glob("runs/**/rows/**/*.csv"))}
    return summary["settings"], (summary["metrics"], summary["credibility"], rows)


def _ranked(home: Path) -> Answer:
    path = _only(home, "leaderboard.json")
    lines = read_csv(path.with_suffix(".csv"))
    timed = "seconds_per_image"
    return _json(path)["settings"], [{k: v for k, v in line.items() if k != timed} for line in lines]


def reported(home: Path) -> Answer:
    """The answer of ``attack.py reproduce``: settings, tables and report."""
    folder = home / "results"
    tables = {path.name: read_csv(path) for path in sorted(folder.glob("digits/table*.csv"))}
    report = (folder / "report" / "report.md").read_text().splitlines()
    # These lines differ between any two runs: wall time, date and command.
    lines = [line for line in report if not any(word in line for word in ("seconds", ":", "| sum"))]
    return _json(folder / "digits" / "seed0.json")["settings"], (tables, lines)


def _trained(home: Path) -> Answer:
    settings = yaml.safe_load(_only(home, "config.yaml").read_text())
    # There are none without a logger; damaged settings may ask for that.
    return settings, [read_csv(path) for path in sorted(home.glob("runs/**/metrics.csv"))]


def _only(home: Path, name: str) -> Path:
    (path,) = [path for path in home.rglob(name) if "cache" not in path.parts]
    return path


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


EVALUATE = Command("evaluate", attack.main, ("evaluate", "--config", small_project.EXPERIMENT), evaluated)
SVHN = Command("svhn", attack.main, ("evaluate", "--config", small_project.SVHN), evaluated)
FOLDER = Command("folder", attack.main, ("evaluate", "--config", small_project.FOLDER), evaluated)
BOARD = Command("leaderboard", attack.main, ("leaderboard", "--config", small_project.BOARD), _ranked)
REPORT = Command("reproduce", attack.main, ("reproduce", "--config", small_project.GRID), reported)
TRAIN = Command(
    "train",
    train,
    ("fit", "--config", small_project.TRAINING, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"),
    _trained,
)


KINDS = ("config", "checkpoint", "bank", "observations", "adversarials", "idx", "mat", "image", "results")
EITHER, ERROR, RIGHT = "error or right answer", "error", "right answer"


def _settings(
    home: Path, random: Random, files: Sequence[tuple[str, int]], command: Command
) -> Iterator[Mutation]:
    """Damaged configurations; `files` gives each one's path, and how many other values each setting gets."""
    for file, each in files:
        whole = (home / file).read_bytes()
        for mutant in (
            *mutants.of_place(),
            *mutants.of_text(whole),
            *mutants.of_bytes(whole, random, 4),
            *mutants.of_settings(whole, random, each),
        ):
            yield Mutation("config", file, mutant, command, EITHER)


def _files(
    kind: str, home: Path, pattern: str, random: Random, flips: int, command: Command, expected: str
) -> Iterator[Mutation]:
    """Damaged versions of files that match a pattern."""
    for file in sorted(home.glob(pattern)):
        for mutant in mutants.of_bytes(file.read_bytes(), random, flips):
            yield Mutation(kind, str(file.relative_to(home)), mutant, command, expected)


def _data(
    kind: str, home: Path, pattern: str, random: Random, flips: int, command: Command
) -> Iterator[Mutation]:
    """Damaged and missing data files."""
    for file in sorted(home.glob(pattern)):
        for mutant in mutants.of_place():
            yield Mutation(kind, str(file.relative_to(home)), mutant, command, ERROR)
    yield from _files(kind, home, pattern, random, flips, command, EITHER)


def _of_evaluate(home: Path, random: Random) -> Iterator[Mutation]:
    names = (
        (small_project.EXPERIMENT, 2),
        *((f"configs/digits/{n}.yaml", 1) for n in ("surrogate", "data", "network")),
    )
    yield from _settings(home, random, names, EVALUATE)
    (checkpoint,) = home.glob("runs/cache/backbone/*.ckpt")
    given = EVALUATE._replace(args=(*EVALUATE.args, "--backbone.checkpoint=given.ckpt"))
    shutil.copyfile(checkpoint, home / "given.ckpt")
    for mutant in (*mutants.of_place(), *mutants.of_checkpoint(checkpoint)):
        yield Mutation("checkpoint", "given.ckpt", mutant, given, EITHER)
    yield from _files("checkpoint", home, "given.ckpt", random, 20, given, EITHER)
    for kind, pattern, expected in (
        ("checkpoint", "backbone/*", EITHER),
        ("checkpoint", "surrogate/*.*", EITHER),
        ("bank", "votes/*", RIGHT),
        ("observations", "observations/*/*", RIGHT),
        ("observations", "calibration/*", RIGHT),
        ("adversarials", "adversarial/*/*", RIGHT),
    ):
        yield from _files(kind, home, f"runs/cache/{pattern}", random, 4, EVALUATE, expected)
    yield from _data("idx", home, "data/MNIST/raw/*", random, 4, EVALUATE)


def _of_svhn(home: Path, random: Random) -> Iterator[Mutation]:
    yield from _data("mat", home, "data/*.mat", random, 8, SVHN)


def _of_folder(home: Path, random: Random) -> Iterator[Mutation]:
    for kind in ("png", "jpg", "bmp"):
        for part in ("train", "test"):
            file = str(random.choice(sorted((home / "images" / part).glob(f"*/*.{kind}"))).relative_to(home))
            yield Mutation("image", file, mutants.Mutant("a folder", ...), FOLDER, EITHER)
            yield Mutation("image", file, mutants.Mutant("missing", None), FOLDER, EITHER)
            yield from _files("image", home, file, random, 4, FOLDER, EITHER)


def _of_training(home: Path, random: Random) -> Iterator[Mutation]:
    yield from _settings(home, random, [(small_project.TRAINING, 1)], TRAIN)


def _of_board(home: Path, random: Random) -> Iterator[Mutation]:
    yield from _settings(home, random, [(small_project.BOARD, 1)], BOARD)


def _of_report(home: Path, random: Random) -> Iterator[Mutation]:
    yield from _settings(home, random, [(small_project.GRID, 3)], REPORT)
    for name in ("seed0.json", "table?.csv", "experiment.json"):
        yield from _files("results", home, f"results/digits/{name}", random, 6, REPORT, EITHER)


# Each command with the mutations that damage its files, and their kinds.
PLAN: tuple[tuple[Command, Callable[[Path, Random], Iterator[Mutation]], set[str]], ...] = (
    (EVALUATE, _of_evaluate, {"config", "checkpoint", "bank", "observations", "adversarials", "idx"}),
    (SVHN, _of_svhn, {"mat"}),
    (FOLDER, _of_folder, {"image"}),
    (TRAIN, _of_training, {"config"}),
    (BOARD, _of_board, {"config"}),
    (REPORT, _of_report, {"config", "results"}),
)


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
    said = lines[-1][:300] if lines else "nothing said"
    if harmed:
        return "code of the file was run", False
    if ended.code is None:
        return f"still running after {LIMIT:.0f} s", False
    if ended.code < 0:
        return f"killed by signal {-ended.code}", False
    if "Traceback (most recent call last)" in ended.errors:
        return f"traceback: {said}", False
    if ended.code:
        error = next((line for line in reversed(lines) if "error:" in line), "")
        return f"exit code {ended.code}, {error[:300] or said}", ended.code <= 2 and bool(error)
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
    if mutation.expected == "error" and not words.startswith("exit code"):
        good = False
    if mutation.expected == "right answer" and words != "right answer":
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
