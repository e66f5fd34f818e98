"""Trials of a W&B sweep offline: python -m lightning_advknn.sweep configs/digits/sweep.yaml --trials 2.

W&B draws trials on its server, for its local controller too. This draws them here from the same file, runs the file's own
command with each, and leaves offline runs in one group, which `wandb sync` sends like any others.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml

Trial = dict[str, Any]
"""Values by name of parameter."""


def read_sweep(path: Path) -> dict[str, Any]:
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


def draw_trials(sweep: Mapping[str, Any], n: int, seed: int = 0) -> list[Trial]:
    """At most n trials, no two alike: for method ``grid`` the first in order, for ``random`` any.

    >>> draw_trials({"method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"value": 3}}}, 2)
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    values = {name: one.get("values", [one.get("value")]) for name, one in sweep["parameters"].items()}
    trials = [dict(zip(values, each, strict=True)) for each in product(*values.values())]
    if sweep["method"] == "random":
        random.Random(seed).shuffle(trials)  # noqa: S311 -- draws settings, no secrets
    return trials[:n]


def command_of(sweep: Mapping[str, Any], trial: Trial) -> list[str]:
    """The sweep's command with a trial's values, as `wandb agent` makes it."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [sweep["program"]],
        "${args}": [f"--{name}={value}" for name, value in trial.items()],
    }
    return [word for part in sweep["command"] for word in macros.get(part, [str(part)])]


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 if all trials went well, 1 if one failed, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", type=Path, help="A W&B sweep, such as configs/digits/sweep.yaml.")
    parser.add_argument("--trials", type=int, default=2, help="How many to run.")
    parser.add_argument("--seed", type=int, default=0, help="Of the trials that are drawn.")
    options = parser.parse_args(args)
    try:
        sweep = read_sweep(options.sweep)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"sweep: error: {error}\n")
        return 2
    group = {"WANDB_RUN_GROUP": sweep.get("name", options.sweep.stem), "WANDB_MODE": "offline"}
    failed = 0
    for trial in draw_trials(sweep, options.trials, options.seed):
        command = command_of(sweep, trial)
        sys.stderr.write(f"sweep: {shlex.join(command)}\n")
        failed += bool(subprocess.run(command, env={**group, **os.environ}, check=False).returncode)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
