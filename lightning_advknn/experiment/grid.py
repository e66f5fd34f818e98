"""The experiments behind a paper's tables and figures, as data."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from lightning_advknn.command_line import option_text, program
from lightning_advknn.configurations import ConfigFile, name_of
from lightning_advknn.experiment.settings import Experiment, combinations, experiment_parser, read_experiment


@dataclass(frozen=True)
class Part:
    """Experiments that fill one table or figure: one for each seed and combination of varied options.

    Args:
        config: A configuration of ``evaluate``.
        options: Options that differ from it, such as ``images: 1000``.
        vary: Values of further options, such as ``victim.k: [5, 75]``.
        seeds: Of training.
    """

    config: ConfigFile
    options: dict[str, str | int | float] = field(default_factory=dict)
    vary: dict[str, list[str | int | float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Grid:
    """All parts and where they go.

    Args:
        parts: By data set, then by name; both name folders.
        results: Folder of tables, summaries and the report.
        output: Folder of per-sample rows.
        cache: Folder for what later runs can use again.
        root: Folder of the data files, instead of the configurations'.
        device: ``auto`` is the GPU if there is one.
    """

    parts: dict[str, dict[str, Part]]
    results: str = "results"
    output: str = "runs/reproduce"
    cache: str = "runs/cache"
    root: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid.

    Args:
        data: Its data set.
        part: Name of its part.
        variation: What is varied, such as ``k=5``; empty if nothing is.
        experiment: Its settings.
        results: Folder of its tables, shared with other seeds.
        command: What runs it alone.
    """

    data: str
    part: str
    variation: str
    experiment: Experiment
    results: Path
    command: str

    @property
    def name(self) -> str:
        """``<data>/<part>[/<variation>]/seed<N>``."""
        place = filter(None, (self.data, self.part, self.variation, f"seed{self.experiment.seed}"))
        return "/".join(place)


def cells(grid: Grid, only: Sequence[str] = ()) -> list[Cell]:
    """The grid's experiments in order.

    Args:
        grid: What to expand.
        only: Patterns (``*``, ``?``) of names, or beginnings of them such as ``mnist/tables``; none for all.

    Raises:
        ValueError: If a part cannot be read or has no experiments, or a pattern matches nothing.
    """
    found = [
        _make_cell(grid, data, name, part, varied, seed)
        for data, parts in grid.parts.items()
        for name, part in parts.items()
        for varied in combinations(part.vary)
        for seed in part.seeds
    ]
    empty = [data for data, parts in grid.parts.items() if not parts] or ([] if found else ["`parts`"])
    empty += [
        f"{data}/{name}"
        for data, parts in grid.parts.items()
        for name in parts
        if (data, name) not in {(cell.data, cell.part) for cell in found}
    ]
    if empty:
        raise ValueError(
            f"Expected experiments in every part of the grid, but {', '.join(empty)} has none. Give it a part"
            " with seeds and values to vary, or leave it out."
        )
    names = [cell.name for cell in found]
    if len(set(names)) < len(names):
        double = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Expected seeds and varied values to be given once each, but {double} are double.")
    for pattern in only:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"Expected `only` to match some of {names}, but {pattern!r} does not.")
    return [cell for cell in found if not only or any(_matches(cell.name, pattern) for pattern in only)]


def _make_cell(grid: Grid, data: str, name: str, part: Part, varied: Mapping[str, Any], seed: int) -> Cell:
    variation = _variation(varied)
    place = "/".join(filter(None, (data, name, variation)))
    # Tables 1 and 2 of a data set are its main result and lie on top.
    results = Path(grid.results) / data if name == "tables" else Path(grid.results) / place
    options: dict[str, Any] = {
        "config": name_of(part.config.absolute),
        **part.options,
        **varied,
        "seed": seed,
        "output": str(Path(grid.output) / place / f"seed{seed}"),
        "cache": grid.cache,
        "device": grid.device,
        **({} if grid.root is None else {"root": grid.root}),
    }
    defaults = experiment_parser().get_defaults()
    shown = {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}
    arguments = [f"--{key}={option_text(value)}" for key, value in options.items()]
    try:
        experiment = read_experiment(arguments)
    except ArgumentError as error:
        raise ValueError(f"Expected {place} to be an experiment, but: {error}") from error
    command = [f"--{key}={option_text(value)}" for key, value in shown.items()]
    return Cell(
        data,
        name,
        variation,
        experiment,
        results,
        shlex.join([*program(), "evaluate", *command, f"--results={results}"]),
    )


def _variation(varied: Mapping[str, Any]) -> str:
    return ",".join(f"{name.rpartition('.')[2]}={option_text(value)}" for name, value in varied.items())


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern.rstrip('/')}/*")
