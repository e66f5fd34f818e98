"""A leaderboard as tables: its attacks, and published results beside them."""

from collections.abc import Sequence

from lightning_advknn.reports.leaderboards.attack_runs import CLEAN
from lightning_advknn.reports.leaderboards.board import Board, Place
from lightning_advknn.reports.leaderboards.records import BOUND, WORST_CASE
from lightning_advknn.reports.records.published import Published, published_of
from lightning_advknn.reports.render.blocks import Lines, Table
from lightning_advknn.reports.render.means import Mean

_BRIEF = 10  # entries of a brief table

_COLUMNS = {
    "fooled": ("fooled", 1),
    "min_l2_median": ("median L2", 2),
    "min_l2_mean": ("mean L2", 2),
    "credibility_success_mean": ("credibility", 2),
    "detected": ("detected", 1),
    "queries": ("queries", 0),
    "seconds_per_image": ("seconds", 3),
}
"""Titles and digits of columns after the accuracies."""


def attacks_table(board: Board, victim: str, brief: bool = False) -> Table:
    """One row an entry, the strongest first, below the worst case and, if it is known, the lower bound.

    Args:
        board: What to show.
        victim: Whose numbers.
        brief: Show only the strongest `_BRIEF` entries, and fewer columns.
    """
    radii = _evenly(board.radii("linf"), 3 if brief else 6)
    budgets = [1.0, 2.0, 3.0] if brief else [1.0, 2.0, 3.0, 4.0, 5.0]
    places: list[Place] = [*(("linf", eps) for eps in radii), *(("l2", budget) for budget in budgets)]
    kept = ("min_l2_median", "credibility_success_mean", "detected")
    columns = {name: column for name, column in _COLUMNS.items() if not brief or name in kept}
    names = board.ranked(victim)
    shown = names[:_BRIEF] if brief else names
    bound = [BOUND] if board.places(BOUND, victim) else []
    rows: list[list[Lines]] = []
    for name in [WORST_CASE, *bound, *shown]:
        main = board.main(name, victim)
        values = [(board.value(name, victim, "accuracy", place), 1 if brief else 2) for place in places]
        values += [
            (board.value(name, victim, column, main), digits) for column, (_, digits) in columns.items()
        ]
        rows.append([(name,), *((_text(*value),) for value in values)])
    header = [
        "attack",
        *(f"Linf {eps:g}" for eps in radii),
        *(f"L2 {budget:g}" for budget in budgets),
        *(title for title, _ in columns.values()),
    ]
    return Table(_caption(board, victim, len(names), len(shown), brief), header, rows)


def published_table(board: Board, victim: str) -> Table | None:
    """Published results beside the same attack here and all attacks together; None if nothing is comparable.

    Args:
        board: What to show.
        victim: Whose numbers.
    """
    settings = board.content["settings"]
    theirs = published_of(
        settings["data"]["name"], victim.split("/")[0], {"layers": None, **settings["victim"]}
    )
    rows = [row for each in theirs if (row := _published_row(board, victim, each))]
    if not rows:
        return None
    return Table(
        f"{board.title}, {board.victims[victim]}: published numbers beside the same attack here and all"
        " attacks together: accuracy in %, mean true L2 of all and mean credibility (`ge`) of successes."
        " Networks, images and, of AdvKNN, the label that is left differ; AdvKNN's are on all test images.",
        ["published", "here", "at", "accuracy", "here", "worst case", "L2", "here", "credibility", "here"],
        rows,
        headings=3,
    )


def _caption(board: Board, victim: str, n: int, shown: int, brief: bool) -> str:
    clean = _text(board.value(CLEAN, victim, "accuracy", (None, 0.0)))
    which = f"the {shown} strongest of {n}" if shown < n else f"all {n}"
    fooled = "" if brief else "the % that are fooled at any distance and "
    convention = board.content["settings"]["victim"]["convention"]
    more = "" if brief else "; queries of the victim and seconds, for an image"
    if board.places(BOUND, victim):
        more += f"; of `{BOUND}`, what no attack at all can go below"
    approximate = "" if victim == "dnn" else board.approximate
    return (
        f"{board.title}, {board.victims[victim]}{board.sample}{approximate}: accuracy in % ({clean} on clean"
        f" images) under {which} attacks, at eps of Linf and within budgets of true L2; over images,"
        f" {fooled}the least true L2 that fools; at an attack's largest eps, mean credibility"
        f" (`{convention}`) of successes and how many % of them are detected at 5 % false alarms{more}."
    )


def _published_row(board: Board, victim: str, theirs: Published) -> list[Lines]:
    """One published result; empty where the same attack has not been run here."""
    place: Place = ("linf" if theirs.norm == "linf" else "l2", theirs.eps)
    ours = board.value(theirs.entry, victim, "accuracy", place)
    if ours is None:
        return []
    credibility = board.value(theirs.entry, victim, "credibility_success_mean", place)
    if board.content["settings"]["victim"]["convention"] != "ge":
        credibility = None
    worst = board.value(WORST_CASE, victim, "accuracy", place)
    cells = [f"{theirs.accuracy:.2f}", _text(ours), _text(worst)]
    for their, our, digits in (
        (theirs.l2, board.value(theirs.entry, victim, "l2_mean", place), 2),
        (theirs.credibility, credibility, 3),
    ):
        cells += ["-" if their is None else f"{their:.{digits}f}", _text(our, digits)]
    norm = "Linf" if theirs.norm == "linf" else "L2"
    return [(theirs.source,), (theirs.entry,), (f"{norm} {theirs.eps:g}",), *((cell,) for cell in cells)]


def _evenly(values: Sequence[float], n: int) -> list[float]:
    """At most n of some values, evenly spaced from the first to the last."""
    if len(values) <= n:
        return list(values)
    return [values[round(place * (len(values) - 1) / (n - 1))] for place in range(n)]


def _text(value: Mean | None, digits: int = 2) -> str:
    return "-" if value is None else value.text(digits)
