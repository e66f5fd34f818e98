"""``attack.py reproduce``: a grid of experiments; what is missing of it is run."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from lightning_advknn.commands.evaluate import evaluate, prepare
from lightning_advknn.data import MissingDataError
from lightning_advknn.experiment.checking import failed
from lightning_advknn.experiment.grid import Cell, Grid, cells
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.dashboard import Dashboard
from lightning_advknn.reports.leaderboards.checks import Check
from lightning_advknn.reports.paper.report import write_report
from lightning_advknn.reports.records.over_seeds import Planned
from lightning_advknn.storage import check_writable, read_json

State = Literal["done", "to do", "changed", "data missing"]


@dataclass(frozen=True)
class Task:
    """A cell and what there is of it.

    Args:
        cell: What to run.
        state: ``changed`` if its folder holds results of other settings.
        missing: How to get the data, if they are missing.
        work: About how long it takes, in units that all tasks share.
    """

    cell: Cell
    state: State
    missing: str = ""
    work: float = 0.0


def plan(grid: Grid, only: Sequence[str] = (), ranks: Ranks | None = None) -> list[Task]:
    """Check every cell of a grid and see what there is of it, before anything long starts.

    Args:
        grid: What to run.
        only: Names of cells, or beginnings or patterns of them; none for all.
        ranks: Processes that make the same plan.

    Raises:
        ValueError: If anything in a cell cannot work.
        OSError: If a file is missing, other than a data set's, or a folder cannot be written.
        ImportError: If a search backend is not installed.
    """
    for folder in (grid.results, grid.output, grid.cache):
        check_writable(Path(folder))
    missing: dict[str, str] = {}
    tasks = []
    for cell in tqdm(cells(grid, only), desc="check", disable=None, leave=False):
        if cell.data not in missing:
            try:
                run = ExperimentRun(cell.experiment, ranks)
                tasks.append(Task(cell, _state(cell, run), work=_work(run)))
                continue
            except MissingDataError as error:
                missing[cell.data] = str(error)
            except ValueError as error:
                raise ValueError(f"{cell.name}: {error}") from error
        tasks.append(Task(cell, "data missing", missing[cell.data]))
    return tasks


def show(tasks: Sequence[Task]) -> None:
    """Print each cell, what there is of it and what runs it alone."""
    for task in tasks:
        sys.stdout.write(f"{task.state:<12} {task.cell.name}\n             {task.cell.command}\n")
    for data, note in {task.cell.data: task.missing for task in tasks if task.missing}.items():
        sys.stdout.write(f"{data}: data missing. {note}\n")


def reproduce(
    tasks: Sequence[Task], dashboard: Dashboard, ranks: Ranks | None = None, quiet: bool = False
) -> list[str]:
    """Run what is not done, one cell after another.

    Each leaves its results at once, so an interrupted grid goes on with the cell, and within it with the stage, where it stopped.

    Args:
        tasks: From `plan`.
        dashboard: Where each logs to, beside its files.
        ranks: Processes that share the work on each; the first writes.
        quiet: Say nothing of how far it is.

    Returns:
        A line for each check that does not hold, also of what was done before.
    """
    ranks = ranks or Ranks()
    say = _say if ranks.rank == 0 and not quiet else _say_nothing
    names = ranks.agree(
        "the plan", lambda: [task.cell.name for task in tasks if task.state in ("to do", "changed")]
    )
    todo = [task for task in tasks if task.cell.name in names]
    lines: list[str] = []
    for task in tasks:
        if task not in todo:
            say(f"{task.cell.name}: {task.state}")
            if task.state == "done":
                lines += [f"{task.cell.name}: {line}" for line in _failed(task.cell)]
    total, done, started = sum(task.work for task in todo), 0.0, time.perf_counter()
    for number, task in enumerate(todo, 1):
        elapsed = time.perf_counter() - started
        left = f", about {_duration(elapsed / done * (total - done))} left" if done else ""
        say(f"{task.cell.name}: {number} of {len(todo)}, {100 * done / total:.0f} % of the work done{left}")
        run = prepare(task.cell.experiment, str(task.cell.results), replace=True, ranks=ranks)
        with dashboard.experiment("evaluate", run):
            found = evaluate(run, str(task.cell.results), task.cell.command)
        lines += [f"{task.cell.name}: {line}" for line in found]
        done += task.work
    return lines


def report_grid(grid: Grid, tasks: Sequence[Task]) -> None:
    """Write the report of what there is of a grid, into ``report`` in its results folder.

    Args:
        grid: Whose results.
        tasks: From `plan`; they know which data are missing.
    """
    missing = {task.cell.data: task.missing for task in tasks}
    plan: dict[str, dict[str, list[Planned]]] = {}
    for cell in cells(grid):
        planned = Planned(cell.experiment.seed, cell.command, cell.variation, missing.get(cell.data, ""))
        plan.setdefault(cell.data, {}).setdefault(cell.part, []).append(planned)
    folder = Path(grid.results) / "report"
    write_report(plan, Path(grid.results), folder)
    sys.stdout.write(f"The report is in {folder / 'index.html'}\n")


def _state(cell: Cell, run: ExperimentRun) -> State:
    settings = json.loads(json.dumps(run.describe()))
    try:
        made_with = read_json(_summary(cell))["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "to do"
    return "done" if made_with == settings else "changed"


def _failed(cell: Cell) -> list[str]:
    """Checks that do not hold of an experiment that is done; earlier versions kept none."""
    summary = read_json(_summary(cell))
    return failed([Check(**check) for check in summary.get("checks", [])])


def _summary(cell: Cell) -> Path:
    return cell.results / f"seed{cell.experiment.seed}.json"


def _work(run: ExperimentRun) -> float:
    """Images times gradients, where a query of the victims takes as long as 25 of them, and an image's training as 500."""
    attacks = run.experiment.attacks
    gradients = sum(float(attacks[name].settings.get("steps", 1)) + 25 for _, name in run.attacks if name)
    return len(run.test) * (gradients + 25) + 500 * len(run.methods)


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _say_nothing(line: str) -> None:
    pass


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
