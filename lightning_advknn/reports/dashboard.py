"""What `attack.py` finds, on the W&B dashboard that training logs to: read back from its files, so it changes none of them."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_advknn.callbacks.wandb_panels import recorded
from lightning_advknn.choices import WandbMode
from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.grid import Grid
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records.csv_files import Record, read_csv

Point = tuple[str, float, str, float]
"""Axis, place on it, name, value."""


@dataclass(frozen=True)
class Dashboard:
    """Where `attack.py` logs to, beside its files.

    Args:
        wandb_mode: What W&B does with it: by default nothing, as the files have it all. WANDB_MODE, if set, overrides `offline` and `online`.
        wandb_project: W&B's project, that of the training configurations.
    """

    wandb_mode: WandbMode = "disabled"
    wandb_project: str = "lightning-advknn"

    @contextmanager
    def experiment(self, job: str, run: ExperimentRun) -> Iterator[None]:
        """One W&B run of an experiment: its settings at once, and what it has left in its output folder when it is done.

        Args:
            job: W&B's job type.
            run: What is worked on within.

        Raises:
            ImportError: If wandb is not installed.
            ValueError: If the W&B run cannot be started.
        """
        output = Path(run.experiment.output)
        config = {
            "settings": run.describe(),
            "command": shlex.join(["python", *sys.argv]),
            **provenance(run.device),
        }
        about = {"name": str(output), "group": run.data.name}
        with recorded(
            self.wandb_mode, self.wandb_project, output, job_type=job, config=config, **about
        ) as log:
            yield
            log(files(output))
            table2, board = read_csv(output / "table2.csv"), read_csv(output / "leaderboard.csv")
            log(cell_values(table2))
            for axis, place, values in along(
                [*evaluation_points(table2, run.experiment), *leaderboard_points(board, run.experiment)]
            ):
                log({axis: place, **values}, axis)

    @contextmanager
    def grid(self, grid: Grid) -> Iterator[None]:
        """One W&B run of a grid, beside those of its experiments: the report's figures when it is done.

        Args:
            grid: What is worked on within.

        Raises:
            ImportError: If wandb is not installed.
            ValueError: If the W&B run cannot be started.
        """
        about = {"name": Path(grid.results).name, "config": {"command": shlex.join(["python", *sys.argv])}}
        with recorded(
            self.wandb_mode, self.wandb_project, Path(grid.output), job_type="reproduce", **about
        ) as log:
            yield
            log(files(Path(grid.results) / "report"))


def files(folder: Path) -> dict[str, Any]:
    """Tables and pictures of a folder: records by ``tables/<name>``, paths by ``figures/<name>``."""
    tables = {f"tables/{path.stem}": _typed(read_csv(path)) for path in sorted(folder.glob("*.csv"))}
    return tables | {f"figures/{path.stem}": path for path in sorted(folder.glob("*.png"))}


def cell_values(table2: Sequence[Record]) -> dict[str, float]:
    """Cells of Table 2 in [0, 1], to compare experiments by: ``accuracy/<method>/<attack>/<victim>``."""
    return {
        f"accuracy/{_name(record['method'])}/{_name(record['attack'])}/{record['victim']}": _share(record)
        for record in table2
    }


def evaluation_points(table2: Sequence[Record], experiment: Experiment) -> list[Point]:
    """Accuracy against eps and against mean true L2, of each attack function through each method; clean images are at 0.

    Names are ``eps/<method>/<function>/<victim>_acc`` over ``eps/eps``, and the same with ``l2``.
    """
    points = []
    for record in table2:
        attack = experiment.attacks.get(str(record["attack"]))
        functions = {attack.function} if attack else {one.function for one in experiment.attacks.values()}
        for function in sorted(functions):
            name = f"{record['method']}/{_name(function.rpartition('.')[2])}/{record['victim']}_acc"
            for axis, column in (("eps", "eps"), ("l2", "l2_mean")):
                points.append(
                    (f"{axis}/{axis}", float(str(record[column])), f"{axis}/{name}", _share(record))
                )
    return points


def leaderboard_points(board: Sequence[Record], experiment: Experiment) -> list[Point]:
    """Accuracy of each entry against eps, of what was run at it, and against budgets of true L2.

    Names are ``eps/<entry>/<victim>_acc`` over ``eps/eps``, and the same with ``l2``; victims are the backbone, the kNN under attack
    and DkNN.
    """
    victims = {"dnn": "dnn", f"knn/{experiment.victim.layer}": "knn", "dknn": "dknn"}
    points = []
    for record in board:
        run = record["counted"] == "run"
        axis = {("linf", True): "eps", ("l2", False): "l2"}.get((str(record["norm"]), run))
        if axis is None or record["eps"] is None or record["victim"] not in victims:
            continue
        if record["seed"] == str(experiment.seed):
            name = f"{axis}/{_name(record['attack'])}/{victims[str(record['victim'])]}_acc"
            points.append((f"{axis}/{axis}", float(str(record["eps"])), name, _share(record)))
    return points


def along(points: Sequence[Point]) -> Iterator[tuple[str, float, Mapping[str, float]]]:
    """What there is at each place on each axis, in ascending order."""
    places: dict[tuple[str, float], dict[str, float]] = {}
    for axis, place, name, value in points:
        places.setdefault((axis, place), {})[name] = value
    for (axis, place), values in sorted(places.items(), key=lambda item: item[0]):
        yield axis, place, values


def _share(record: Record) -> float:
    return float(str(record["accuracy"])) / 100


def _name(text: object) -> str:
    """As a part of a metric's name: W&B takes a dot for nesting."""
    return str(text).replace(", ", "/").replace(" ", "_").replace(".", "_").replace("@", "_")


def _typed(records: Sequence[Record]) -> list[Record]:
    return [{name: _number(cell) for name, cell in record.items()} for record in records]


def _number(cell: str | float | None) -> str | float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:
        return cell
