"""Folders of results: one experiment's results never overwrite another's or mix with them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_advknn.storage import check_writable, read_json, write_json

_EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True)
class Claim:
    """A folder that an experiment wants for its results.

    Args:
        folder: The folder.
        settings: Settings that the results depend on, as JSON reads them back.
        results: Names of files that count as results. A folder without any of them is free.
        own: Whether the folder is for this experiment alone.
    """

    folder: Path
    settings: dict[str, Any]
    results: Sequence[str]
    own: bool = False

    def check(self) -> None:
        """Check that the folder is free or holds this experiment's results.

        Raises:
            ValueError: If it holds another experiment's results or, with `own`, other files.
        """
        owner = self.owner()
        if owner != self.settings and any((self.folder / result).is_file() for result in self.results):
            raise ValueError(
                f"Expected {self.folder} to be empty or to hold this experiment's results, but its"
                f" {_EXPERIMENT_FILE} is of another experiment. Choose another folder, or delete this one."
            )
        # Hidden files are the system's, or those of a run that is starting right now.
        there = any(not path.name.startswith(".") for path in self.folder.iterdir())
        if self.own and there and not (self.folder / _EXPERIMENT_FILE).is_file():
            raise ValueError(
                f"Expected {self.folder} to be empty or to hold this experiment's results, but it holds other"
                " files. Choose another folder."
            )

    def owner(self) -> Any:
        """Settings of the experiment that the folder belongs to; None if it belongs to none."""
        try:
            return read_json(self.folder / _EXPERIMENT_FILE)
        except (FileNotFoundError, ValueError):
            return None

    def clear(self) -> None:
        """Delete the files of an experiment, and nothing else."""
        shutil.rmtree(self.folder / "rows", ignore_errors=True)
        for pattern in (
            _EXPERIMENT_FILE,
            "table?.csv",
            "seed*.json",
            "summary.json",
            "neighbours.*",
            "adversarials.*",
            *(["leaderboard.*"] if self.own else []),  # in a shared folder it is another experiment's
        ):
            for path in self.folder.glob(pattern):
                path.unlink()


def take(claims: Sequence[Claim], replace: bool = False) -> None:
    """Give folders to an experiment: all of them or none.

    Args:
        claims: On the folders.
        replace: Delete results of other experiments instead of raising an error.

    Raises:
        ValueError: If a folder holds other results or files.
        OSError: If a folder cannot be written.
    """
    for claim in claims:
        check_writable(claim.folder)
        if replace and claim.owner() not in (None, claim.settings):
            claim.clear()
        claim.check()
    for claim in claims:
        if claim.owner() != claim.settings:
            claim.clear()  # files of a run that did not finish
            write_json(claim.folder / _EXPERIMENT_FILE, claim.settings)


def without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """An experiment's settings, the same for all seeds."""
    trainings = {
        name: {key: value for key, value in training.items() if key != "seed_everything"}
        for name, training in settings["trainings"].items()
    }
    return {**settings, "trainings": trainings}
