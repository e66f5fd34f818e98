"""A leaderboard over seeds, read back from its files and ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_advknn.choices import Norm
from lightning_advknn.reports.leaderboards.attack_runs import CLEAN
from lightning_advknn.reports.leaderboards.records import BOUND, WORST_CASE
from lightning_advknn.reports.records.csv_files import Record, check_seeds, mean_of, number, read_csv
from lightning_advknn.reports.records.grouping import grouped
from lightning_advknn.reports.records.names import DATA_CLASSES, DATA_TITLES, VICTIM_TITLES
from lightning_advknn.reports.records.summaries import neighbours_sentence, which_images
from lightning_advknn.reports.render.means import Mean
from lightning_advknn.storage import read_json

NAME = "leaderboard"  # of its files

Place = tuple[Norm | None, float | None]
"""Norm and eps of a record."""


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    Args:
        records: Lines of its CSV file.
        content: Of its JSON file: ``settings``, the same for all seeds, and ``runs`` by seed.
    """

    records: Sequence[Record]
    content: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Name of the data set in tables."""
        name = self.content["settings"]["data"]["name"]
        return next((DATA_TITLES[key] for key, kind in DATA_CLASSES.items() if kind == name), name)

    @property
    def victims(self) -> dict[str, str]:
        """Victims with a table, and their titles: DkNN, the kNN on the layer under attack, the backbone."""
        layer = self.content["settings"]["victim"]["layer"]
        return {
            "dknn": VICTIM_TITLES["dknn"],
            f"knn/{layer}": f"{VICTIM_TITLES['knn']} on {layer}",
            "dnn": VICTIM_TITLES["dnn"],
        }

    @property
    def sample(self) -> str:
        """For captions: which test images are attacked; "" if all are."""
        settings = self.content["settings"]
        return f", {which_images(settings, settings['images'])}" if "images" in settings else ""

    @property
    def approximate(self) -> str:
        """For captions: by seed, how approximate neighbours were found; "" of exact ones."""
        found = {
            seed: neighbours_sentence(run.get("approximation", {}).get("origin"))
            for seed, run in self.content["runs"].items()
        }
        said = [f"seed {seed}: {sentence.rstrip('.')}" for seed, sentence in found.items() if sentence]
        return f" ({'; '.join(said)})" if said else ""

    def radii(self, norm: Norm) -> list[float]:
        """Each eps of this norm with records."""
        return sorted({eps for _, _, (at, eps) in self._cells if at == norm and eps is not None})

    def value(self, attack: str, victim: str, column: str, place: Place) -> Mean | None:
        """A number over seeds; None unless every seed has it."""
        found = self._cells.get((attack, victim, place), [])
        if not found or any(record[column] is None for record in found):
            return None
        return mean_of(found, column)

    def places(self, attack: str, victim: str) -> list[Place]:
        """Places of an entry's records, first those that it was run at."""
        return [place for name, judge, place in self._cells if (name, judge) == (attack, victim)]

    def main(self, attack: str, victim: str) -> Place:
        """The place at which an entry is strongest: no eps, or else the largest it was run at.

        That of the worst case and the lower bound is the largest budget.
        """
        places = self.places(attack, victim)
        counted = {place: self._cells[attack, victim, place][0]["counted"] for place in places}
        own = [place for place in places if counted[place] == "run"] or [p for p in places if p[0] == "l2"]
        return max(own, key=lambda place: float("inf") if place[1] is None else place[1])

    def ranked(self, victim: str) -> list[str]:
        """Entries from the strongest to the weakest against a victim.

        They are sorted by the median of least true L2, then by the accuracy within the largest budget.
        """

        def key(attack: str) -> tuple[float, float]:
            median = self.value(attack, victim, "min_l2_median", self.main(attack, victim))
            left = self.value(attack, victim, "accuracy", ("l2", self.radii("l2")[-1]))
            return median.mean if median else float("inf"), left.mean if left else 100.0

        names = dict.fromkeys(name for name, judge, _ in self._cells if judge == victim)
        return sorted((name for name in names if name not in (CLEAN, WORST_CASE, BOUND)), key=key)

    @cached_property
    def _cells(self) -> dict[tuple[str, str, Place], list[Record]]:
        return grouped(self.records, lambda each: (str(each["attack"]), str(each["victim"]), _place(each)))


def read_board(folder: Path) -> Board | None:
    """The leaderboard of a results folder; None if it has none.

    Raises:
        ValueError: If it is damaged.
    """
    path, table = folder / f"{NAME}.json", folder / f"{NAME}.csv"
    if not table.is_file() or not path.is_file():
        return None
    try:
        content = read_json(path)
        check_seeds(table, {int(seed): run.get("lines") for seed, run in content["runs"].items()})
        return Board(read_csv(table), content)
    except ValueError as error:
        raise ValueError(f"{error} Delete the leaderboard in {folder} and make it again.") from error


def _place(record: Record) -> Place:
    norm: Norm | None = None if record["norm"] is None else "linf" if record["norm"] == "linf" else "l2"
    return norm, None if record["eps"] is None else number(record, "eps")
