"""Results of `attack.py` on the W&B dashboard that training logs to. They are read back from the files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_advknn.choices import WandbMode
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records.csv_files import Record, number, read_csv
from lightning_advknn.reports.records.grouping import grouped

_Point = tuple[str, float, str, float]
"""Axis, place on it, name, value."""


@dataclass(frozen=True)
class Dashboard:
    """Where `attack.py` logs to, beside its files.

    Args:
        wandb_mode: What W&B does. By default nothing: the files have all results. WANDB_MODE, if set,
            overrides `offline` and `online`.
        wandb_project: W&B's project, that of the training configurations.
    """

    wandb_mode: WandbMode = "disabled"
    wandb_project: str = "lightning-advknn"

    @contextmanager
    def experiment(self, job: str, experiment: Experiment, **about: Any) -> Iterator[None]:
        """Record an experiment as a W&B run: its settings at once, and in the end what its output folder has.

        Args:
            job: W&B's job type.
            experiment: What runs within.
            about: Further arguments of ``wandb.init``: ``group``, ``config``.

        Raises:
            ImportError: If wandb is not installed.
            ValueError: If the W&B run cannot be started.
        """
        from lightning_advknn.callbacks.wandb_panels import recorded  # heavy

        output = Path(experiment.output)
        about = {"name": str(output), "job_type": job, **about}
        with recorded(self.wandb_mode, self.wandb_project, output, **about) as log:
            yield
            log(_files(output))
            table2, board = read_csv(output / "table2.csv"), read_csv(output / "leaderboard.csv")
            log(_cell_values(table2))
            points = [*_evaluation_points(table2, experiment), *_leaderboard_points(board, experiment)]
            for axis, place, values in _along(points):
                log({axis: place, **values}, axis)

    @contextmanager
    def grid(self, results: Path, output: Path, **about: Any) -> Iterator[None]:
        """Record a grid as a W&B run beside those of its experiments: in the end, the figures of its report.

        Args:
            results: Folder of the grid's results and its report.
            output: Folder of W&B's files.
            about: Further arguments of ``wandb.init``: ``config``.

        Raises:
            ImportError: If wandb is not installed.
            ValueError: If the W&B run cannot be started.
        """
        from lightning_advknn.callbacks.wandb_panels import recorded  # heavy

        about = {"name": results.name, "job_type": "reproduce", **about}
        with recorded(self.wandb_mode, self.wandb_project, output, **about) as log:
            yield
            log(_files(results / "report"))


def _files(folder: Path) -> dict[str, Any]:
    """Tables and pictures of a folder: records by ``tables/<name>``, paths by ``figures/<name>``."""
    tables = {f"tables/{path.stem}": _typed(read_csv(path)) for path in sorted(folder.glob("*.csv"))}
    return tables | {f"figures/{path.stem}": path for path in sorted(folder.glob("*.png"))}


def _cell_values(table2: Sequence[Record]) -> dict[str, float]:
    """Cells of Table 2 in [0, 1], to compare experiments by: ``accuracy/<method>/<attack>/<victim>``."""
    return {
        f"accuracy/{_name(record['method'])}/{_name(record['attack'])}/{record['victim']}": _share(record)
        for record in table2
    }


def _evaluation_points(table2: Sequence[Record], experiment: Experiment) -> list[_Point]:
    """Accuracy against eps and against mean true L2, by attack function and method. Clean images are at 0.

    Names are ``eps/<method>/<function>/<victim>_acc`` over ``eps/eps``, and the same with ``l2``.
    """
    points = []
    for record in table2:
        attack = experiment.attacks.get(str(record["attack"]))
        functions = {attack.function} if attack else {one.function for one in experiment.attacks.values()}
        for function in sorted(functions):
            name = f"{record['method']}/{_name(function.rpartition('.')[2])}/{record['victim']}_acc"
            for axis, column in (("eps", "eps"), ("l2", "l2_mean")):
                points.append((f"{axis}/{axis}", number(record, column), f"{axis}/{name}", _share(record)))
    return points


def _leaderboard_points(board: Sequence[Record], experiment: Experiment) -> list[_Point]:
    """Accuracy of each entry against the eps that it was run at, and against budgets of true L2.

    Names are ``eps/<entry>/<victim>_acc`` over ``eps/eps``, and the same with ``l2``. Victims are the
    backbone, the kNN under attack and DkNN.
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
            points.append((f"{axis}/{axis}", number(record, "eps"), name, _share(record)))
    return points


def _along(points: Sequence[_Point]) -> Iterator[tuple[str, float, Mapping[str, float]]]:
    """Values at each place on each axis, in ascending order."""
    for (axis, place), found in sorted(grouped(points, lambda point: point[:2]).items()):
        yield axis, place, {name: value for *_, name, value in found}


def _share(record: Record) -> float:
    return number(record, "accuracy") / 100


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
