"""What the commands share: claims on folders, rows and checks, what summaries say, W&B."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning_advknn.command_line import command
from lightning_advknn.data.files import ImageFiles
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.grid import Grid
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.dashboard import Dashboard
from lightning_advknn.reports.leaderboards.evidence import Evidence
from lightning_advknn.reports.leaderboards.failures import Looked
from lightning_advknn.reports.records.classes import classes_of
from lightning_advknn.reports.records.folders import Claim
from lightning_advknn.reports.records.rows_files import constants_of, write_rows
from lightning_advknn.reports.records.summaries import note_of

See = Callable[[str, str | None, Rows], None]


def say(line: str, quiet: bool = False) -> None:
    """Print a line."""
    if not quiet:
        sys.stdout.write(f"{line}\n")


def settings_of(run: ExperimentRun) -> dict[str, Any]:
    """An experiment's settings, as JSON reads them back."""
    settings: dict[str, Any] = json.loads(json.dumps(run.describe()))
    return settings


def output_claim(run: ExperimentRun, settings: dict[str, Any]) -> Claim:
    """The claim of an experiment on its output folder."""
    folder = Path(run.experiment.output)
    return Claim(folder, settings, ("summary.json", "leaderboard.csv"), own=True)


def saved_rows(run: ExperimentRun, method: str, attack: str | None, network: str | None = None) -> Rows:
    """Rows of an experiment, as `ExperimentRun.rows`, which are also written into its output folder.

    The file is ``rows/[<network>/]<method>/<attack>.csv``.
    """
    rows, images = run.rows(method, attack, network), run.test.images
    victims = run.transfers[network] if network else run.attacked
    constants = constants_of(run.experiment, method, attack, network, victims.approximation)
    folder = Path(run.experiment.output) / "rows" / (network or "") / method
    files = images.names if isinstance(images, ImageFiles) else None
    write_rows(folder / f"{attack or 'clean'}.csv", rows, victims.layers, constants, files)
    return rows


def gather(run: ExperimentRun, pairs: Iterable[tuple[str, str | None]], see: See | None = None) -> Evidence:
    """Write rows and gather what checks need.

    Args:
        run: The experiment.
        pairs: Methods and attacks; the first is `ORIGIN` without an attack.
        see: Called with each method, attack and rows, which are not kept.
    """
    first, *others = pairs
    clean = saved_rows(run, *first)
    evidence = Evidence(run.experiment, run.attacked.layers, run.calibration_votes(), clean)
    evidence.asked_again["clean images"] = run.asked_again(*first)
    if see:
        see(*first, clean)
    for method, attack in others:
        rows = saved_rows(run, method, attack)
        if see:
            see(method, attack, rows)
        if attack is not None:
            seconds, queries = run.cost(method, attack)
            iterates, imitates = run.iterates(method, attack), run.imitated(method)
            more = {"seconds": seconds, "queries": queries, "imitates": imitates, "iterates": iterates}
            evidence.add(method, attack, rows, **more)
            evidence.asked_again[f"{attack}, {method}"] = run.asked_again(method, attack)
    evidence.looked = {method: Looked(**run.gradients(method)) for method in evidence.differentiated}
    return evidence


def note_on(run: ExperimentRun, network: str = ORIGIN) -> str:
    """What qualifies every number on a network; "" if nothing does."""
    victims = run.attacked if network == ORIGIN else run.transfers[network]
    return note_of(run.data.name, run.data.note, victims.approximation)


def about(run: ExperimentRun) -> dict[str, Any]:
    """What every summary says first: versions, device, date, number of images, classes."""
    classes = classes_of(run.data, run.test.labels)
    return {**provenance(run.device), "images": len(run.test), "classes": classes}


def seconds_of(run: ExperimentRun) -> dict[str, float]:
    """Wall time by stage."""
    return {stage: round(seconds, 1) for stage, seconds in run.cache.seconds().items()}


def approximations_of(run: ExperimentRun) -> dict[str, Any]:
    """``approximation`` by network; empty if all neighbours are exact."""
    networks = {ORIGIN: run.attacked, **run.transfers}
    found = {name: victims.approximation for name, victims in networks.items() if victims.approximation}
    return {"approximation": found} if found else {}


def tell_all(ranks: Ranks, lines: Sequence[str] = ()) -> list[str]:
    """The first rank's lines, on all ranks. They wait for them, so that all exit with the same code."""
    return ranks.agree("which checks hold", lambda: list(lines))


def record_experiment(dashboard: Dashboard, job: str, run: ExperimentRun) -> AbstractContextManager[None]:
    """A W&B run of an experiment, as `Dashboard.experiment`."""
    config = {"settings": run.describe(), "command": command(), **provenance(run.device)}
    return dashboard.experiment(job, run.experiment, group=run.data.name, config=config)


def record_grid(dashboard: Dashboard, grid: Grid) -> AbstractContextManager[None]:
    """A W&B run of a grid, as `Dashboard.grid`."""
    return dashboard.grid(Path(grid.results), Path(grid.output), config={"command": command()})
