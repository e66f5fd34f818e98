"""The commands evaluate, leaderboard and reproduce, from their options to an exit code."""

import io
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stderr
from typing import Any, TextIO

import torch

from lightning_advknn.commands.evaluate import evaluate, prepare
from lightning_advknn.commands.leaderboard import leaderboard, prepare_leaderboard
from lightning_advknn.commands.reproduce import plan, report_grid, reproduce, show
from lightning_advknn.commands.steps import record_experiment, record_grid
from lightning_advknn.experiment.grid import Grid
from lightning_advknn.experiment.settings import experiment_of
from lightning_advknn.ranks import Ranks, is_lost, join
from lightning_advknn.reports.dashboard import Dashboard

_Work = Callable[[], list[str]]
"""Long work; gives a line for each check that does not hold."""


def run(name: str, options: Any, program: str) -> int:
    """Run a command and return its exit code.

    Args:
        name: Of the command.
        options: From `options.parse`.
        program: Name in messages.
    """
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    with redirect_stderr(_NoTerminal(sys.stderr)) if options.quiet else nullcontext():
        return _run_with_others(name, options, program)


def _run_with_others(name: str, options: Any, program: str) -> int:
    ranks = Ranks()
    try:
        ranks = join(options.timeout)
        if ranks.size > 1:
            signal.signal(signal.SIGTERM, _when_terminated(program))
        return _run(name, options, ranks, program)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        sys.stderr.write(
            f"{program}: rank {ranks.rank}: error: {error} What is finished is kept: the same command goes"
            " on from here.\n"
        )
        return 1
    except ValueError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return 2


def _run(name: str, options: Any, ranks: Ranks, program: str) -> int:
    start = {"evaluate": _evaluate, "leaderboard": _leaderboard, "reproduce": _reproduce}[name]
    try:
        work = start(options, ranks)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return 2
    try:
        failed = work()
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; the same command goes on from here\n")
        return 130
    except SystemExit:  # with code 143; of several ranks each has said so
        if ranks.size == 1:
            sys.stderr.write(f"{program}: terminated; the same command goes on from here\n")
        raise
    except (ValueError, OSError) as error:
        sys.stderr.write(
            f"{program}: error: {error}\nWhat was done is kept; the same command goes on from here.\n"
        )
        return 1
    except torch.OutOfMemoryError as error:
        sys.stderr.write(
            f"{program}: error: the GPU's memory is full: {error}\nLower `--victim.memory_gib`, the share of banks"
            " and searches. What was done is kept; the same command goes on from here.\n"
        )
        return 1
    if ranks.rank == 0:
        sys.stdout.writelines(f"{line}\n" for line in failed)
        sys.stdout.flush()
    return 3 if failed and options.strict else 0


def _when_terminated(program: str) -> Callable[[int, object], None]:
    def leave(signum: int, frame: object) -> None:
        sys.stderr.write(
            f"{program}: terminated, as launchers do with all processes when one has died; what is"
            " finished is kept: the same command goes on from here\n"
        )
        sys.exit(143)

    return leave


def _evaluate(options: Any, ranks: Ranks) -> _Work:
    run = prepare(experiment_of(options), options.results, ranks=ranks)
    recording = record_experiment(_dashboard(options), "evaluate", run)
    return _recorded(recording, lambda: evaluate(run, options.results, quiet=options.quiet))


def _leaderboard(options: Any, ranks: Ranks) -> _Work:
    run = prepare_leaderboard(experiment_of(options), options.results, ranks)
    recording = record_experiment(_dashboard(options), "leaderboard", run)
    return _recorded(recording, lambda: leaderboard(run, options.results, quiet=options.quiet))


def _reproduce(options: Any, ranks: Ranks) -> _Work:
    grid = Grid(**{name: getattr(options, name) for name in Grid.__dataclass_fields__})
    tasks = plan(grid, options.only, ranks)
    dashboard = _dashboard(options)

    def show_plan() -> list[str]:
        if ranks.rank == 0:
            show(tasks)
        return []

    def go_on() -> list[str]:
        failed = reproduce(tasks, dashboard, ranks, options.quiet)
        if ranks.rank == 0:
            report_grid(grid, tasks)
        return failed

    return show_plan if options.dry_run else _recorded(record_grid(dashboard, grid), go_on)


def _dashboard(options: Any) -> Dashboard:
    return Dashboard(options.wandb_mode, options.wandb_project)


def _recorded(recording: AbstractContextManager[None], work: _Work) -> _Work:
    """Start to record now, so that what is wrong with that is found before anything long runs."""
    with ExitStack() as stack:
        stack.enter_context(recording)
        started = stack.pop_all()

    def go_on() -> list[str]:
        with started:
            return work()

    return go_on


class _NoTerminal(io.TextIOBase):
    """Passes on what is written, but is no terminal: progress is shown on terminals only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()
