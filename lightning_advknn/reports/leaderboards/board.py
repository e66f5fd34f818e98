"""A leaderboard read back from its files, over seeds: ranked, as tables, as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_advknn.choices import Norm
from lightning_advknn.reports.leaderboards.attack_runs import CLEAN
from lightning_advknn.reports.leaderboards.records import BOUND, WORST_CASE
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import Record, check_seeds, read_csv
from lightning_advknn.reports.records.over_seeds import CLASSES, TITLES, VICTIMS, Mean
from lightning_advknn.reports.records.summary import neighbours_sentence, which_images
from lightning_advknn.reports.render.page import Lines, Table
from lightning_advknn.storage import read_json

NAME = "leaderboard"  # of its files
BRIEF = 10  # entries of a brief table

Place = tuple[Norm | None, float | None]
"""Norm and eps of a record."""


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    Args:
        records: Lines of its CSV file.
        content: Of its JSON file: ``settings``, which are the same for all seeds, and ``runs`` by seed.
    """

    records: Sequence[Record]
    content: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Name of the data set."""
        name = self.content["settings"]["data"]["name"]
        return next((TITLES[key] for key, kind in CLASSES.items() if kind == name), name)

    @property
    def victims(self) -> dict[str, str]:
        """Victims that tables are of, with their titles: DkNN, the kNN on the layer under attack, the backbone."""
        layer = self.content["settings"]["victim"]["layer"]
        return {
            "dknn": VICTIMS["dknn"],
            f"knn/{layer}": f"{VICTIMS['knn']} on {layer}",
            "dnn": VICTIMS["dnn"],
        }

    @property
    def sample(self) -> str:
        """What captions say of the test images if they are not all; "" if they are."""
        settings = self.content["settings"]
        return f", {which_images(settings, settings['images'])}" if "images" in settings else ""

    @property
    def approximate(self) -> str:
        """What captions say of approximate neighbours, by seed; "" of exact ones."""
        found = {
            seed: neighbours_sentence(run.get("approximation", {}).get("origin"))
            for seed, run in self.content["runs"].items()
        }
        said = [f"seed {seed}: {sentence.rstrip('.')}" for seed, sentence in found.items() if sentence]
        return f" ({'; '.join(said)})" if said else ""

    def radii(self, norm: Norm) -> list[float]:
        """Each eps of this norm that there are records at."""
        return sorted({eps for _, _, (at, eps) in self._cells if at == norm and eps is not None})

    def value(self, attack: str, victim: str, column: str, place: Place) -> Mean | None:
        """A number over seeds; None unless all of them have it."""
        found = [record[column] for record in self._cells.get((attack, victim, place), [])]
        return Mean(tuple(float(str(value)) for value in found)) if found and None not in found else None

    def places(self, attack: str, victim: str) -> list[Place]:
        """Where an entry has records, those of what it was run at first."""
        return [place for name, judge, place in self._cells if (name, judge) == (attack, victim)]

    def main(self, attack: str, victim: str) -> Place:
        """Where an entry does most: without an eps, else at the largest that it was run at; the worst case, at the largest budget."""
        places = self.places(attack, victim)
        counted = {place: self._cells[attack, victim, place][0]["counted"] for place in places}
        own = [place for place in places if counted[place] == "run"] or [p for p in places if p[0] == "l2"]
        return max(own, key=lambda place: float("inf") if place[1] is None else place[1])

    def ranked(self, victim: str) -> list[str]:
        """Entries, the strongest against a victim first: by the median of least true L2, then by what the largest budget leaves."""

        def key(attack: str) -> tuple[float, float]:
            median = self.value(attack, victim, "min_l2_median", self.main(attack, victim))
            left = self.value(attack, victim, "accuracy", ("l2", self.radii("l2")[-1]))
            return median.mean if median else float("inf"), left.mean if left else 100.0

        names = dict.fromkeys(name for name, judge, _ in self._cells if judge == victim)
        return sorted((name for name in names if name not in (CLEAN, WORST_CASE, BOUND)), key=key)

    @cached_property
    def _cells(self) -> dict[tuple[str, str, Place], list[Record]]:
        cells: dict[tuple[str, str, Place], list[Record]] = {}
        for record in self.records:
            norm: Norm | None = (
                None if record["norm"] is None else "linf" if record["norm"] == "linf" else "l2"
            )
            eps = None if record["eps"] is None else float(record["eps"])
            cells.setdefault((str(record["attack"]), str(record["victim"]), (norm, eps)), []).append(record)
        return cells


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


def board_table(board: Board, victim: str, brief: bool = False) -> Table:
    """One row an entry, the strongest first, after the worst case and, where it is known, the lower bound.

    Args:
        board: What to show.
        victim: Whose numbers.
        brief: Only the strongest `BRIEF` entries, and fewer columns.
    """
    radii, budgets = (
        _spread(board.radii("linf"), 3 if brief else 6),
        [1.0, 2.0, 3.0, 4.0, 5.0][: 3 if brief else 5],
    )
    places: list[Place] = [("linf", eps) for eps in radii]
    places += [("l2", budget) for budget in budgets]
    columns = {
        "fooled": ("fooled", 1),
        "min_l2_median": ("median L2", 2),
        "min_l2_mean": ("mean L2", 2),
        "credibility_success_mean": ("credibility", 2),
        "detected": ("detected", 1),
        "queries": ("queries", 0),
        "seconds_per_image": ("seconds", 3),
    }
    if brief:
        columns = {name: columns[name] for name in ("min_l2_median", "credibility_success_mean", "detected")}
    names = board.ranked(victim)
    shown = names[:BRIEF] if brief else names
    rows: list[list[Lines]] = []
    bounded = bool(board.places(BOUND, victim))
    for name in [WORST_CASE, *[BOUND] * bounded, *shown]:
        main = board.main(name, victim)
        values = [(board.value(name, victim, "accuracy", place), 1 if brief else 2) for place in places]
        values += [
            (board.value(name, victim, column, main), digits) for column, (_, digits) in columns.items()
        ]
        rows.append([(name,), *((_text(*value),) for value in values)])
    clean = _text(board.value(CLEAN, victim, "accuracy", (None, 0.0)))
    which = f"the {len(shown)} strongest of {len(names)}" if len(shown) < len(names) else f"all {len(names)}"
    fooled = "" if brief else "the % that are fooled at any distance and "
    convention = board.content["settings"]["victim"]["convention"]
    more = "" if brief else "; queries of the victim and seconds, for an image"
    # `qp` is exact for the same problem, and may be above the minimum within [0, 1].
    more += (
        f"; of `{BOUND}`, what no attack at all can go below, as if pixels had no range (for which alone `qp` is exact)"
        if bounded
        else ""
    )
    approximate = "" if victim == "dnn" else board.approximate
    return Table(
        f"{board.title}, {board.victims[victim]}{board.sample}{approximate}: accuracy in % ({clean} on clean images) under {which} attacks, at eps of Linf and within"
        f" budgets of true L2; over images, {fooled}the least true L2 that fools; at an attack's largest eps, mean credibility"
        f" (`{convention}`) of successes and how many % of them are detected at 5 % false alarms{more}.",
        [
            "attack",
            *(f"Linf {eps:g}" for eps in radii),
            *(f"L2 {budget:g}" for budget in budgets),
            *(title for title, _ in columns.values()),
        ],
        rows,
    )


def published_table(board: Board, victim: str) -> Table | None:
    """What others have published beside the same attack here and all attacks together; None where nothing is comparable.

    Args:
        board: What to show.
        victim: Whose numbers.
    """
    settings = board.content["settings"]
    theirs = published.published(
        settings["data"]["name"], victim.split("/")[0], {"layers": None, **settings["victim"]}
    )
    rows: list[list[Lines]] = []
    for each in theirs:
        place: Place = ("linf" if each.norm == "linf" else "l2", each.eps)
        credibility = board.value(each.entry, victim, "credibility_success_mean", place)
        values = [
            (each.accuracy, board.value(each.entry, victim, "accuracy", place), 2),
            (each.l2, board.value(each.entry, victim, "l2_mean", place), 2),
            (each.credibility, credibility if settings["victim"]["convention"] == "ge" else None, 3),
        ]
        (accuracy, ours, _), *others = values
        if ours is None:
            continue
        worst = _text(board.value(WORST_CASE, victim, "accuracy", place))
        cells = [f"{accuracy:.2f}", _text(ours), worst]
        for their, our, digits in others:
            cells += ["-" if their is None else f"{their:.{digits}f}", _text(our, digits)]
        norm = "Linf" if each.norm == "linf" else "L2"
        rows.append([(each.source,), (each.entry,), (f"{norm} {each.eps:g}",), *((cell,) for cell in cells)])
    if not rows:
        return None
    return Table(
        f"{board.title}, {board.victims[victim]}: published numbers beside the same attack here and all attacks together: accuracy"
        " in %, mean true L2 of all and mean credibility (`ge`) of successes. Networks, images and, of AdvKNN, the label that is"
        " left differ; AdvKNN's are on all test images.",
        ["published", "here", "at", "accuracy", "here", "worst case", "L2", "here", "credibility", "here"],
        rows,
        headings=3,
    )


def _spread(values: Sequence[float], n: int) -> list[float]:
    """At most n of some values, at even distances from the first to the last."""
    if len(values) <= n:
        return list(values)
    return [values[round(place * (len(values) - 1) / (n - 1))] for place in range(n)]


def _text(value: Mean | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.{digits}f}" + ("" if value.sd is None else f" ± {value.sd:.{digits}f}")
