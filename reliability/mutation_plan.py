"""The damaged files of the small project, and the commands that read them."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import attack
from lightning_advknn.commands.train import main as train
from reliability import mutants, small_project
from reliability.answers import Answer, evaluated, ranked, reported, trained
from reliability.forks import Main


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


EVALUATE = Command("evaluate", attack.main, ("evaluate", "--config", small_project.EXPERIMENT), evaluated)


SVHN = Command("svhn", attack.main, ("evaluate", "--config", small_project.SVHN), evaluated)


FOLDER = Command("folder", attack.main, ("evaluate", "--config", small_project.FOLDER), evaluated)


BOARD = Command("leaderboard", attack.main, ("leaderboard", "--config", small_project.BOARD), ranked)


REPORT = Command("reproduce", attack.main, ("reproduce", "--config", small_project.GRID), reported)


TRAIN = Command(
    "train",
    train,
    ("fit", "--config", small_project.TRAINING, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"),
    trained,
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
