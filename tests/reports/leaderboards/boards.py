"""Leaderboards made by hand."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lightning_advknn.reports.leaderboards.board import Board, read_board
from lightning_advknn.reports.leaderboards.records import LEADERBOARD
from lightning_advknn.reports.records.csv_files import write_csv

VICTIMS = ("dnn", "knn/relu2", "knn/relu3", "dknn")


def line(
    attack: str, victim: str, norm: str | None, eps: float | None, seed: int, **more: Any
) -> dict[str, Any]:
    counted = "nearest" if norm == "l2" and eps is not None else "run"
    return {
        "attack": attack,
        "victim": victim,
        "norm": norm,
        "eps": eps,
        "seed": seed,
        "n": 100,
        "counted": counted,
        **more,
    }


def lines(attack: str, seed: int, strength: float, ball: bool) -> list[dict[str, Any]]:
    """A whole entry, which leaves 100 - strength * budget % against DkNN, 1 point less against the others per
    seed."""
    found = []
    for victim in VICTIMS:
        entry: dict[str, Any] = {
            "fooled": 97.0 + seed,
            "min_l2_median": round(50 / strength + seed, 4),
            "queries": 0.0 if ball else 120.4,
            "seconds_per_image": 0.25,
        }
        if victim != "dnn":
            entry |= {"credibility_success_mean": 0.2 + 0.1 * seed, "detected": 40.0}

        def left(budget: float, victim: str = victim) -> float:
            return round(max(100 - strength * budget - seed - (victim != "dknn"), 0), 4)

        if ball:
            found += [
                line(attack, victim, "linf", eps, seed, accuracy=left(10 * eps), **entry)
                for eps in (0.1, 0.2, 0.3, 0.4)
            ]
        elif attack != "worst case":
            found.append(line(attack, victim, "l2", None, seed, accuracy=0.0, **entry))
        found += [
            line(attack, victim, "l2", half / 2, seed, accuracy=left(half / 2), **entry)
            for half in range(1, 11)
        ]
    return found


def write_board(folder: Path, entries: dict[str, tuple[float, bool]], seeds: tuple[int, ...] = (0,)) -> Board:
    """Write a leaderboard's files: entries with their strength, and whether they are at eps of Linf."""
    records = []
    for seed in seeds:
        records += [line("clean", victim, None, 0, seed, accuracy=98.0 + seed) for victim in VICTIMS]
        for attack, (strength, ball) in entries.items():
            records += lines(attack, seed, strength, ball)
        records += lines("worst case", seed, 50.0, False)
    check = {"check": "it is sound", "holds": True, "detail": "2 things"}
    run = {
        "command": "python attack.py leaderboard",
        "device": "2 CPU cores",
        "date": "2026-11-23",
        "images": 100,
        "checks": [check, {**check, "holds": False}, {**check, "holds": None}],
    }
    write_csv(folder / "leaderboard.csv", LEADERBOARD, records)
    settings = {"data": {"name": "FashionMNIST"}, "victim": {"layer": "relu3", "convention": "ge"}}
    content = {"settings": settings, "runs": {str(seed): run for seed in seeds}}
    (folder / "leaderboard.json").write_text(json.dumps(content))
    board = read_board(folder)
    assert board is not None
    return board


ENTRIES = {"fgsm, origin": (10.0, True), "bim, origin": (20.0, True), "least, dknn": (40.0, False)}


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}
