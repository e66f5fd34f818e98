"""Attack kNN and DkNN and measure it: python attack.py evaluate --config configs/digits/attack.yaml.

Under torchrun or srun, its processes share the work; the results are those of one process.

What no sound evaluation violates is checked; checks that do not hold are the last lines printed.

Exit codes: 0 done; 3 done, but with --strict a check does not hold; 2 bad arguments, settings, files or folders, found before anything long has run; 1 something went wrong
later, such as a full disk or the death of another process; 130 interrupted; 143 terminated. After 1, 130 and 143, the same
command goes on from there.
"""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from jsonargparse import ArgumentParser

from lightning_advknn.commands.evaluate import evaluate, prepare
from lightning_advknn.commands.leaderboard import leaderboard, prepare_leaderboard
from lightning_advknn.commands.reproduce import plan, report_grid, reproduce, show
from lightning_advknn.commands.steps import record_experiment, record_grid
from lightning_advknn.experiment.grid import Grid
from lightning_advknn.experiment.settings import experiment_of, experiment_parser
from lightning_advknn.ranks import Ranks, is_lost, join
from lightning_advknn.reports.dashboard import Dashboard

Work = Callable[[], list[str]]
"""Long work; gives a line for each check that does not hold."""


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subcommands()
    for name, description in (
        ("evaluate", "Run one experiment: train what is missing, attack, report."),
        ("leaderboard", "Run one experiment and rank its attacks against every victim."),
    ):
        command = experiment_parser(description=description)
        command.add_class_arguments(Dashboard)
        command.add_argument(
            "--results",
            type=str | None,
            default=None,
            help="Folder of tables over several seeds, such as results/mnist, to add this seed to.",
        )
        _add_further(command)
        commands.add_subcommand(name, command)
    command = ArgumentParser(
        description="Run a grid of experiments, what is missing of it, and report on all."
    )
    command.add_argument("--config", action="config", help="A grid, such as configs/reproduce.yaml.")
    command.add_class_arguments(Grid)
    command.add_class_arguments(Dashboard)
    command.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="Names of cells, or beginnings or patterns of them, such as mnist/tables '*/seed0'.",
    )
    command.add_argument("--dry-run", action="store_true", help="Show what there is and what would run.")
    _add_further(command)
    commands.add_subcommand("reproduce", command)
    return parser


def _add_further(command: ArgumentParser) -> None:
    command.add_argument(
        "--strict", action="store_true", help="Exit with code 3 if a check of the results does not hold."
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="Of several processes: seconds without a sign of life after which another counts as dead.",
    )


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = make_parser()
    try:
        options = parser.instantiate(parser.parse_args(args))
    except (TypeError, RecursionError) as error:  # jsonargparse takes some nestings for others
        parser.error(f"Expected settings nested as in configs/, but: {error}")
    except UnicodeError as error:
        parser.error(f"Expected a configuration to be text in UTF-8, but: {error}. Save it in that encoding.")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ranks = Ranks()
    try:
        ranks = join(options[options.subcommand].timeout)
        if ranks.size > 1:
            signal.signal(signal.SIGTERM, _terminated)
        return _run(options, ranks)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        sys.stderr.write(
            f"attack.py: rank {ranks.rank}: error: {error} What is finished is kept: the same command goes on from here.\n"
        )
        return 1
    except ValueError as error:
        sys.stderr.write(f"attack.py: error: {error}\n")
        return 2


def _run(options: Any, ranks: Ranks) -> int:
    start = {"evaluate": _evaluate, "leaderboard": _leaderboard, "reproduce": _reproduce}
    try:
        go_on = start[options.subcommand](options[options.subcommand], ranks)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"attack.py: error: {error}\n")
        return 2
    try:
        failed = go_on()
    except KeyboardInterrupt:
        sys.stderr.write("attack.py: interrupted; the same command goes on from here\n")
        return 130
    except SystemExit:  # with code 143; of several ranks each has said so
        if ranks.size == 1:
            sys.stderr.write("attack.py: terminated; the same command goes on from here\n")
        raise
    except (ValueError, OSError) as error:
        sys.stderr.write(
            f"attack.py: error: {error}\nWhat was done is kept; the same command goes on from here.\n"
        )
        return 1
    if ranks.rank == 0:
        sys.stdout.writelines(f"{line}\n" for line in failed)
        sys.stdout.flush()
    return 3 if failed and options[options.subcommand].strict else 0


def _terminated(signum: int, frame: object) -> None:
    sys.stderr.write(
        "attack.py: terminated, as launchers do with all processes when one has died; what is finished is kept: the same command"
        " goes on from here\n"
    )
    sys.exit(143)


def _evaluate(options: Any, ranks: Ranks) -> Work:
    run = prepare(experiment_of(options), options.results, ranks=ranks)
    recording = record_experiment(_dashboard(options), "evaluate", run)
    return _recorded(recording, lambda: evaluate(run, options.results))


def _leaderboard(options: Any, ranks: Ranks) -> Work:
    run = prepare_leaderboard(experiment_of(options), options.results, ranks)
    recording = record_experiment(_dashboard(options), "leaderboard", run)
    return _recorded(recording, lambda: leaderboard(run, options.results))


def _reproduce(options: Any, ranks: Ranks) -> Work:
    grid = Grid(**{name: getattr(options, name) for name in Grid.__dataclass_fields__})
    tasks = plan(grid, options.only, ranks)
    dashboard = _dashboard(options)

    def show_plan() -> list[str]:
        if ranks.rank == 0:
            show(tasks)
        return []

    def go_on() -> list[str]:
        failed = reproduce(tasks, dashboard, ranks)
        if ranks.rank == 0:
            report_grid(grid, tasks)
        return failed

    return show_plan if options.dry_run else _recorded(record_grid(dashboard, grid), go_on)


def _dashboard(options: Any) -> Dashboard:
    return Dashboard(options.wandb_mode, options.wandb_project)


def _recorded(recording: AbstractContextManager[None], work: Work) -> Work:
    """Start to record now, so that what is wrong with that is found before anything long runs."""
    with ExitStack() as stack:
        stack.enter_context(recording)
        started = stack.pop_all()

    def go_on() -> list[str]:
        with started:
            return work()

    return go_on


if __name__ == "__main__":
    sys.exit(main())
