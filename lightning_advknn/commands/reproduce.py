"""``attack.py reproduce``: a grid of experiments; those without results are run."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from lightning_advknn.commands.evaluate import evaluate, prepare
from lightning_advknn.commands.steps import record_experiment, say, settings_of
from lightning_advknn.data import MissingDataError
from lightning_advknn.experiment.grid import Cell, Grid, cells
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.dashboard import Dashboard
from lightning_advknn.reports.leaderboards.checks import Check, failed
from lightning_advknn.reports.paper.report import write_report
from lightning_advknn.reports.records.over_seeds import Planned
from lightning_advknn.storage import check_writable, read_json

State = Literal["done", "to do", "changed", "data missing"]


@dataclass(frozen=True)
class Task:
    """A cell of a grid and its state.

    Args:
        cell: What to run.
        state: ``changed`` if its folder holds results of other settings.
        missing: How to get the data, if they are missing.
        work: Estimate of its time, in a unit that all tasks share.
    """

    cell: Cell
    state: State
    missing: str = ""
    work: float = 0.0


def plan(grid: Grid, only: Sequence[str] = (), ranks: Ranks | None = None) -> list[Task]:
    """Check every cell of a grid and find its state, before anything long starts.

    Args:
        grid: What to run.
        only: Names of cells, or beginnings or patterns of them; none for all.
        ranks: Processes that make the same plan.

    Raises:
        ValueError: If a cell cannot work.
        OSError: If a file other than a data set's is missing, or a folder cannot be written.
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
    """Print each cell, its state and the command that runs it alone."""
    for task in tasks:
        say(f"{task.state:<12} {task.cell.name}\n             {task.cell.command}")
    for data, note in {task.cell.data: task.missing for task in tasks if task.missing}.items():
        say(f"{data}: data missing. {note}")


def reproduce(
    tasks: Sequence[Task], dashboard: Dashboard, ranks: Ranks | None = None, quiet: bool = False
) -> list[str]:
    """Run what is not done, one cell after another.

    Each cell leaves its results at once, so an interrupted grid continues with the cell, and in it with the
    stage, where it stopped.

    Args:
        tasks: From `plan`.
        dashboard: Where each logs to, beside its files.
        ranks: Processes that share the work on each cell; the first writes.
        quiet: Print only where the results are.

    Returns:
        A line for each check that fails, also of cells that were done before.
    """
    ranks = ranks or Ranks()
    quiet = quiet or ranks.rank > 0
    names = ranks.agree(
        "the plan", lambda: [task.cell.name for task in tasks if task.state in ("to do", "changed")]
    )
    todo = [task for task in tasks if task.cell.name in names]
    lines: list[str] = []
    for task in tasks:
        if task not in todo:
            _log(f"{task.cell.name}: {task.state}", quiet)
            if task.state == "done":
                lines += [f"{task.cell.name}: {line}" for line in _failed(task.cell)]
    total, done, started = sum(task.work for task in todo), 0.0, time.perf_counter()
    for number, task in enumerate(todo, 1):
        elapsed = time.perf_counter() - started
        left = f", about {_duration(elapsed / done * (total - done))} left" if done else ""
        share = f"{100 * done / total:.0f} % of the work done"
        _log(f"{task.cell.name}: {number} of {len(todo)}, {share}{left}", quiet)
        run = prepare(task.cell.experiment, str(task.cell.results), replace=True, ranks=ranks)
        with record_experiment(dashboard, "evaluate", run):
            found = evaluate(run, str(task.cell.results), task.cell.command, quiet)
        lines += [f"{task.cell.name}: {line}" for line in found]
        done += task.work
    return lines


def report_grid(grid: Grid, tasks: Sequence[Task]) -> None:
    """Write the report on a grid's results, into ``report`` in its results folder.

    Args:
        grid: Whose results.
        tasks: From `plan`, which found missing data.
    """
    missing = {task.cell.data: task.missing for task in tasks}
    planned: dict[str, dict[str, list[Planned]]] = {}
    for cell in cells(grid):
        own = Planned(cell.experiment.seed, cell.command, cell.variation, missing.get(cell.data, ""))
        planned.setdefault(cell.data, {}).setdefault(cell.part, []).append(own)
    folder = Path(grid.results) / "report"
    write_report(planned, Path(grid.results), folder)
    say(f"The report is in {folder / 'index.html'}")


def _state(cell: Cell, run: ExperimentRun) -> State:
    try:
        made_with = read_json(_summary(cell))["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "to do"
    return "done" if made_with == settings_of(run) else "changed"


def _failed(cell: Cell) -> list[str]:
    """Failed checks of an experiment that is done; earlier versions kept none."""
    summary = read_json(_summary(cell))
    return failed([Check(**check) for check in summary.get("checks", [])])


def _summary(cell: Cell) -> Path:
    return cell.results / f"seed{cell.experiment.seed}.json"


def _work(run: ExperimentRun) -> float:
    """Images times gradients; querying the victims counts as 25 gradients, training on an image as 500."""
    attacks = run.experiment.attacks
    gradients = sum(float(attacks[name].settings.get("steps", 1)) + 25 for _, name in run.attacks if name)
    return len(run.test) * (gradients + 25) + 500 * len(run.methods)


def _log(line: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
