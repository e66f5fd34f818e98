"""Whose results a folder holds: no experiment's are ever overwritten by, or mixed with, another's."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_advknn.storage import check_writable, read_json, write_json

EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True)
class Claim:
    """A folder that an experiment wants for its results.

    Args:
        folder: Which.
        settings: What the results depend on, as JSON reads it back.
        results: Files that say the folder holds results; without any, its last owner came to nothing.
        own: Whether the folder is the experiment's alone.
    """

    folder: Path
    settings: dict[str, Any]
    results: Sequence[str]
    own: bool = False

    def check(self) -> None:
        """Raise a ValueError if the folder holds another experiment's results, or, if it is `own`, other files."""
        owner = self.owner()
        if owner != self.settings and any((self.folder / result).is_file() for result in self.results):
            raise ValueError(
                f"Expected {self.folder} to be empty or to hold this experiment's results, but its {EXPERIMENT_FILE} is of"
                " another experiment. Choose another folder, or delete this one."
            )
        # Hidden files are those of another run that begins in this moment, or of the system.
        there = any(not path.name.startswith(".") for path in self.folder.iterdir())
        if self.own and there and not (self.folder / EXPERIMENT_FILE).is_file():
            raise ValueError(
                f"Expected {self.folder} to be empty or to hold this experiment's results, but it holds other files."
                " Choose another folder."
            )

    def owner(self) -> Any:
        """The settings of the experiment whose folder it is; None if it is nobody's."""
        try:
            return read_json(self.folder / EXPERIMENT_FILE)
        except (FileNotFoundError, ValueError):
            return None

    def clear(self) -> None:
        """Delete what an experiment left there, and nothing else."""
        shutil.rmtree(self.folder / "rows", ignore_errors=True)
        for pattern in (
            EXPERIMENT_FILE,
            "table?.csv",
            "seed*.json",
            "summary.json",
            "neighbours.*",
            "adversarials.*",
            *(["leaderboard.*"] if self.own else []),  # a shared folder's is of another experiment
        ):
            for path in self.folder.glob(pattern):
                path.unlink()


def take(claims: Sequence[Claim], replace: bool = False) -> None:
    """Give folders to an experiment: all of them or none.

    Args:
        claims: On them.
        replace: Delete what they hold of other experiments, instead of raising an error.

    Raises:
        ValueError: If a folder holds something else.
        OSError: If a folder cannot be written.
    """
    for claim in claims:
        check_writable(claim.folder)
        if replace and claim.owner() not in (None, claim.settings):
            claim.clear()
        claim.check()
    for claim in claims:
        if claim.owner() != claim.settings:
            claim.clear()  # left by a run that came to nothing
            write_json(claim.folder / EXPERIMENT_FILE, claim.settings)


def without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """An experiment's settings, the same for all seeds."""
    trainings = {
        name: {key: value for key, value in training.items() if key != "seed_everything"}
        for name, training in settings["trainings"].items()
    }
    return {**settings, "trainings": trainings}
