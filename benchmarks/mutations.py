"""What becomes of damaged files and settings: python -m benchmarks.mutations [--kinds config idx] [--seed 0].

A small project (`benchmarks.small`) is run once; then, for each way to damage one of its files, a copy of it is damaged and the
same command is run again. Two outcomes are good: an error in words (exit code 2, or 1 once long work has begun, and no
traceback) or the right answer, which means that equal settings gave equal numbers, to the last digit, and other
settings are recorded as such. A traceback, a crash, a hang or other numbers under equal settings are not.

Written to ``mutations.csv``: kind, mutation, expected, outcome, ok.
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
from benchmarks import mutants, small
from benchmarks.forks import Fork, Main, Outcome
from lightning_advknn.experiment.device import provenance
from lightning_advknn.reports.records.csv_files import read_csv, write_csv
from lightning_advknn.storage import write_json
from lightning_advknn.training_cli import main as train

LIMIT = 300.0  # seconds until a run counts as hanging
COLUMNS = ("kind", "mutation", "expected", "outcome", "ok")

Answer = tuple[Any, Any]
"""Settings as they were recorded, and numbers."""


class Command(NamedTuple):
    """What is run on damaged files."""

    name: str
    main: Main
    args: tuple[str, ...]
    read: Callable[[Path], Answer]
    """Reads what it left in the project's folder."""


class Case(NamedTuple):
    """A file of the project with other content."""

    kind: str
    file: str
    mutant: mutants.Mutant
    command: Command
    expected: str


def evaluated(home: Path) -> Answer:
    """Settings, and metrics and rows, that ``attack.py evaluate`` left in a project."""
    summary = _json(_only(home, "summary.json"))
    rows = {str(p.relative_to(home)): read_csv(p) for p in sorted(home.glob("runs/**/rows/**/*.csv"))}
    return summary["settings"], (summary["metrics"], summary["credibility"], rows)


def _ranked(home: Path) -> Answer:
    path = _only(home, "leaderboard.json")
    lines = read_csv(path.with_suffix(".csv"))
    timed = "seconds_per_image"
    return _json(path)["settings"], [{k: v for k, v in line.items() if k != timed} for line in lines]


def reported(home: Path) -> Answer:
    """Settings, and tables and report, that ``attack.py reproduce`` left in a project."""
    folder = home / "results"
    tables = {path.name: read_csv(path) for path in sorted(folder.glob("digits/table*.csv"))}
    told = (folder / "report" / "report.md").read_text().splitlines()
    # What differs between any two runs: wall time, and when and by which command it was.
    lines = [line for line in told if not any(word in line for word in ("seconds", ":", "| sum"))]
    return _json(folder / "digits" / "seed0.json")["settings"], (tables, lines)


def _trained(home: Path) -> Answer:
    settings = yaml.safe_load(_only(home, "config.yaml").read_text())
    # None without a logger, which may be what was asked for.
    return settings, [read_csv(path) for path in sorted(home.glob("runs/**/metrics.csv"))]


def _only(home: Path, name: str) -> Path:
    (path,) = [path for path in home.rglob(name) if "cache" not in path.parts]
    return path


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


EVALUATE = Command("evaluate", attack.main, ("evaluate", "--config", small.EXPERIMENT), evaluated)
SVHN = Command("svhn", attack.main, ("evaluate", "--config", small.SVHN), evaluated)
FOLDER = Command("folder", attack.main, ("evaluate", "--config", small.FOLDER), evaluated)
BOARD = Command("leaderboard", attack.main, ("leaderboard", "--config", small.BOARD), _ranked)
REPORT = Command("reproduce", attack.main, ("reproduce", "--config", small.GRID), reported)
TRAIN = Command(
    "train",
    train,
    ("fit", "--config", small.TRAINING, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"),
    _trained,
)


KINDS = ("config", "checkpoint", "bank", "observations", "adversarials", "idx", "mat", "image", "results")
EITHER, ERROR, RIGHT = "error or right answer", "error", "right answer"


def _settings(
    home: Path, random: Random, files: Sequence[tuple[str, int]], command: Command
) -> Iterator[Case]:
    """Configurations, and how many other values each setting gets."""
    for file, each in files:
        whole = (home / file).read_bytes()
        for mutant in (
            *mutants.of_place(),
            *mutants.of_text(whole),
            *mutants.of_bytes(whole, random, 4),
            *mutants.of_settings(whole, random, each),
        ):
            yield Case("config", file, mutant, command, EITHER)


def _files(
    kind: str, home: Path, pattern: str, random: Random, flips: int, command: Command, expected: str
) -> Iterator[Case]:
    """Files that match a pattern, damaged."""
    for file in sorted(home.glob(pattern)):
        for mutant in mutants.of_bytes(file.read_bytes(), random, flips):
            yield Case(kind, str(file.relative_to(home)), mutant, command, expected)


def _data(
    kind: str, home: Path, pattern: str, random: Random, flips: int, command: Command
) -> Iterator[Case]:
    """Data files, damaged or not there."""
    for file in sorted(home.glob(pattern)):
        for mutant in mutants.of_place():
            yield Case(kind, str(file.relative_to(home)), mutant, command, ERROR)
    yield from _files(kind, home, pattern, random, flips, command, EITHER)


def _of_evaluate(home: Path, random: Random) -> Iterator[Case]:
    names = (
        (small.EXPERIMENT, 2),
        *((f"configs/digits/{n}.yaml", 1) for n in ("surrogate", "data", "network")),
    )
    yield from _settings(home, random, names, EVALUATE)
    (checkpoint,) = home.glob("runs/cache/backbone/*.ckpt")
    given = EVALUATE._replace(args=(*EVALUATE.args, "--backbone.checkpoint=given.ckpt"))
    shutil.copyfile(checkpoint, home / "given.ckpt")
    for mutant in (*mutants.of_place(), *mutants.of_checkpoint(checkpoint)):
        yield Case("checkpoint", "given.ckpt", mutant, given, EITHER)
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


def _of_svhn(home: Path, random: Random) -> Iterator[Case]:
    yield from _data("mat", home, "data/*.mat", random, 8, SVHN)


def _of_folder(home: Path, random: Random) -> Iterator[Case]:
    for kind in ("png", "jpg", "bmp"):
        for part in ("train", "test"):
            file = str(random.choice(sorted((home / "images" / part).glob(f"*/*.{kind}"))).relative_to(home))
            yield Case("image", file, mutants.Mutant("a folder", ...), FOLDER, EITHER)
            yield Case("image", file, mutants.Mutant("missing", None), FOLDER, EITHER)
            yield from _files("image", home, file, random, 4, FOLDER, EITHER)


def _of_training(home: Path, random: Random) -> Iterator[Case]:
    yield from _settings(home, random, [(small.TRAINING, 1)], TRAIN)


def _of_board(home: Path, random: Random) -> Iterator[Case]:
    yield from _settings(home, random, [(small.BOARD, 1)], BOARD)


def _of_report(home: Path, random: Random) -> Iterator[Case]:
    yield from _settings(home, random, [(small.GRID, 3)], REPORT)
    for name in ("seed0.json", "table?.csv", "experiment.json"):
        yield from _files("results", home, f"results/digits/{name}", random, 6, REPORT, EITHER)


# Commands, and what is damaged before they run again.
PLAN: tuple[tuple[Command, Callable[[Path, Random], Iterator[Case]], set[str]], ...] = (
    (EVALUATE, _of_evaluate, {"config", "checkpoint", "bank", "observations", "adversarials", "idx"}),
    (SVHN, _of_svhn, {"mat"}),
    (FOLDER, _of_folder, {"image"}),
    (TRAIN, _of_training, {"config"}),
    (BOARD, _of_board, {"config"}),
    (REPORT, _of_report, {"config", "results"}),
)


def prepare(home: Path, logs: Path, kinds: set[str], random: Random) -> tuple[list[Case], dict[str, Answer]]:
    """Run the undamaged project.

    Args:
        home: Empty folder for it.
        logs: For what runs write.
        kinds: Of files to damage.
        random: Chooses bits and values.

    Returns:
        All cases of these kinds, and what each command found.
    """
    small.write_project(home)
    cases: list[Case] = []
    right = {}
    for command, make, kinds_of_it in PLAN:
        if kinds & kinds_of_it:
            outcome = Fork(command.main, command.args, home, logs).wait(600)
            if outcome.code:
                raise RuntimeError(
                    f"Expected the undamaged project to run, but {command.name}: {outcome.errors}"
                )
            right[command.name] = command.read(home)
            for made in (home / "runs").iterdir():
                if made.name != "cache":
                    shutil.rmtree(made)
            cases += [case for case in make(home, random) if case.kind in kinds]
    return cases, right


def judge(outcome: Outcome, answer: Answer | None, right: Answer, harmed: bool) -> tuple[str, bool]:
    """An outcome in words, and whether it is good."""
    lines = outcome.errors.strip().splitlines()
    said = lines[-1][:300] if lines else "nothing said"
    if harmed:
        return "code of the file was run", False
    if outcome.code is None:
        return f"still running after {LIMIT:.0f} s", False
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}", False
    if "Traceback (most recent call last)" in outcome.errors:
        return f"traceback: {said}", False
    if outcome.code:
        error = next((line for line in reversed(lines) if "error:" in line), "")
        return f"exit code {outcome.code}, {error[:300] or said}", outcome.code <= 2 and bool(error)
    if answer is None:
        return "nothing to read", False
    if answer == right:
        return "right answer", True
    return ("right answer, to other settings", True) if answer[0] != right[0] else ("other numbers", False)


def run(case: Case, home: Path, right: Answer) -> tuple[Any, ...]:
    """A line of the results."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "project"
        shutil.copytree(home, place)
        if case.kind != "results":
            shutil.rmtree(place / "results", ignore_errors=True)
        for made in (place / "runs").iterdir():
            if made.name != "cache":
                shutil.rmtree(made)
        file = place / case.file
        file.unlink()
        if case.mutant.content is ...:
            file.mkdir()
        elif case.mutant.content is not None:
            file.write_bytes(case.mutant.content)
        outcome = Fork(case.command.main, case.command.args, place, Path(folder) / "logs").wait(LIMIT)
        answer = None
        if outcome.code == 0:
            try:
                answer = case.command.read(place)
            except (ValueError, OSError, KeyError):
                answer = None
        told, good = judge(outcome, answer, right, any(place.rglob("harmed")))
    told = told.replace(str(place), "").replace(str(home), "")
    if case.expected == "error" and not told.startswith("exit code"):
        good = False
    if case.expected == "right answer" and told != "right answer":
        good = False
    return case.kind, f"{case.file}: {case.mutant.name}", case.expected, told, good


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if an outcome is not good."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="Of files; all.")
    parser.add_argument("--only", type=int, help="Only so many of each kind, drawn at random.")
    parser.add_argument("--seed", type=int, default=0, help="Of bits and values; %(default)s.")
    parser.add_argument("--output", default="results/reliability", help="Folder; %(default)s.")
    given = parser.parse_args(args)
    random = Random(given.seed)  # noqa: S311  # chooses, and guards nothing
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "project"
        home.mkdir()
        chosen, right = prepare(home, Path(folder) / "logs", set(given.kinds), random)
        if given.only:
            of_kind = [[case for case in chosen if case.kind == kind] for kind in given.kinds]
            chosen = [case for cases in of_kind for case in random.sample(cases, min(given.only, len(cases)))]
        lines = []
        for case in tqdm(chosen, desc="mutations", disable=None):
            found = run(case, home, right[case.command.name])
            lines.append(dict(zip(COLUMNS, found, strict=True)))
            if not lines[-1]["ok"]:
                tqdm.write(": ".join(found[:2] + found[3:4]), file=sys.stdout)
                sys.stdout.flush()
    write_csv(Path(given.output) / "mutations.csv", COLUMNS, lines)
    command = shlex.join(["python", "-m", "benchmarks.mutations", *(sys.argv[1:] if args is None else args)])
    write_json(Path(given.output) / "mutations.json", {"command": command, **provenance(torch.device("cpu"))})
    good = sum(line["ok"] for line in lines)
    sys.stdout.write(f"{good} of {len(lines)} outcomes are good\n")
    return 0 if good == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
