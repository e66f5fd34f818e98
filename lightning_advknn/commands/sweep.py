"""Trials of a W&B sweep offline: ``lightning-advknn sweep digits/sweep --trials 2``.

W&B draws trials on its server, even for its local controller. This command draws them here from the same
file and runs the file's own command with each. It leaves offline runs in one group, which `wandb sync`
sends like any others.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_advknn.command_line import PROGRAM
from lightning_advknn.commands import COMMANDS
from lightning_advknn.configurations import find
from lightning_advknn.experiment.settings import combinations

_Trial = dict[str, Any]
"""Values by name of parameter."""


def _read_sweep(path: Path) -> dict[str, Any]:
    """A sweep's configuration.

    Raises:
        ValueError: If it is none, or has what only W&B's server can draw.
        OSError: If it cannot be read.
    """
    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML, but: {error}") from error
    missing = {"program", "command", "method", "parameters"} - set(sweep if isinstance(sweep, dict) else ())
    if missing:
        raise ValueError(f"Expected {path} to be a W&B sweep, but it has no {', '.join(sorted(missing))}.")
    if sweep["method"] not in ("grid", "random"):
        raise ValueError(
            f"Expected `method` to be grid or random, but got {sweep['method']!r}. Offline, nothing learns from trials."
        )
    for name, parameter in sweep["parameters"].items():
        if not {"value", "values"} & set(parameter):
            raise ValueError(
                f"Expected `values` of {name}, but got {parameter}. `wandb sweep` draws from distributions."
            )
    return dict(sweep)


def _draw_trials(sweep: Mapping[str, Any], n: int, seed: int = 0) -> list[_Trial]:
    """At most n trials, no two alike: for method ``grid`` the first in order, for ``random`` any.

    >>> _draw_trials({"method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"value": 3}}}, 2)
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    values = {name: one.get("values", [one.get("value")]) for name, one in sweep["parameters"].items()}
    trials = combinations(values)
    if sweep["method"] == "random":
        random.Random(seed).shuffle(trials)  # noqa: S311 -- draws settings, no secrets
    return trials[:n]


def _command_of(sweep: Mapping[str, Any], trial: _Trial) -> list[str]:
    """The sweep's command with a trial's values, as `wandb agent` makes it."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [sweep["program"]],
        "${args}": [f"--{name}={value}" for name, value in trial.items()],
    }
    return [word for part in sweep["command"] for word in macros.get(part, [str(part)])]


def main(args: Sequence[str] | None = None, program: str = f"{PROGRAM} sweep") -> int:
    """Run the command line and return its exit code: 0 if all trials went well, 1 if one failed, 2 for bad input.

    Args:
        args: Arguments instead of the process's own.
        program: Its name in messages.
    """
    parser = argparse.ArgumentParser(program, description=COMMANDS["sweep"])
    parser.add_argument("sweep", help="A W&B sweep: a file, or one that ships, such as digits/sweep.")
    parser.add_argument("--trials", type=int, default=2, help="How many to run (default: %(default)s).")
    parser.add_argument(
        "--seed", type=int, default=0, help="Of the trials that are drawn (default: %(default)s)."
    )
    options = parser.parse_args(args)
    try:
        path = find(options.sweep)
        sweep = _read_sweep(path)
    except (TypeError, ValueError, OSError) as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return 2
    group = {"WANDB_RUN_GROUP": sweep.get("name", path.stem), "WANDB_MODE": "offline"}
    failed = 0
    for trial in _draw_trials(sweep, options.trials, options.seed):
        command = _command_of(sweep, trial)
        sys.stderr.write(f"{program}: {shlex.join(command)}\n")
        failed += bool(subprocess.run(command, env={**group, **os.environ}, check=False).returncode)
    return int(failed > 0)
