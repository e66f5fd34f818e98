"""``attack.py leaderboard``: every attack beside every other, against every victim."""

from pathlib import Path
from typing import Any

from lightning_advknn import command_line
from lightning_advknn.commands import steps
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, Experiment
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.leaderboards.attack_runs import FALSE_ALARMS, alarm_threshold
from lightning_advknn.reports.leaderboards.board import NAME, Board, read_board
from lightning_advknn.reports.leaderboards.checks import failed
from lightning_advknn.reports.leaderboards.page import print_board, write_page
from lightning_advknn.reports.leaderboards.records import LEADERBOARD, leaderboard_records
from lightning_advknn.reports.records.classes import classes_line, names_of
from lightning_advknn.reports.records.csv_files import CsvTable, read_csv, with_note
from lightning_advknn.reports.records.folders import take, without_seed
from lightning_advknn.storage import check_writable, locked, write_json


def prepare_leaderboard(
    experiment: Experiment, results: str | None = None, ranks: Ranks | None = None
) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of a leaderboard over several seeds, or None.
        ranks: Processes that share the work. Only the first checks the folders.

    Raises:
        ValueError: If the experiment cannot work, or a folder holds other results or files.
        OSError: If a file is missing or a folder cannot be written.
        ImportError: If the search backend or an attack's library is not installed.
    """
    if experiment.transfer:
        raise ValueError(
            f"Expected no `transfer` in a leaderboard, but got {list(experiment.transfer)}. `attack.py"
            " evaluate` has other networks judge."
        )
    for attack in experiment.attacks.values():
        _ = attack.measure
    if experiment.victim.shard and experiment.victim.metric == "euclidean":
        raise ValueError(
            "Expected no `victim.shard` in a leaderboard of a Euclidean kNN, whose lower bounds read the"
            " whole bank. Switch it off, and lower `memory_gib` if the bank does not fit."
        )
    run = ExperimentRun(experiment, ranks)
    if run.ranks.rank == 0:
        settings = steps.settings_of(run)
        if results is not None:
            _check_owner(Path(results), without_seed(settings))
        take([steps.output_claim(run, settings)])
    return run


def leaderboard(run: ExperimentRun, results: str | None = None, quiet: bool = False) -> list[str]:
    """Run a prepared experiment and leave a leaderboard in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``leaderboard.csv`` (columns
    `LEADERBOARD`), ``leaderboard.json`` (settings; by seed: checks, thresholds of credibility, wall time by
    stage, command, versions, device, date), the same for reading as ``leaderboard.md``, and as PNG and PDF
    curves of accuracy against true L2. With several ranks, all call this and the first writes.

    Args:
        run: From `prepare_leaderboard`.
        results: Folder of a leaderboard over several seeds, which gets this seed's lines.
        quiet: Print only where the results are.

    Returns:
        A line for each check that fails.
    """
    if not run.fill(bounds=True):
        return steps.tell_all(run.ranks)
    steps.say(classes_line(run.data), quiet)
    evidence = steps.gather(run, [(ORIGIN, None), *(pair for pair in run.attacks if pair[1])])
    bounds, seed = run.bounds(), run.experiment.seed
    checks = evidence.checks(names_of(run.data), bounds)
    note = steps.note_on(run)
    records = leaderboard_records(evidence.runs, evidence.clean, seed, bounds)
    summary = {
        "command": command_line.command(),
        **steps.about(run),
        "seconds": steps.seconds_of(run),
        **steps.approximations_of(run),
        "false_alarms": FALSE_ALARMS,
        "thresholds": {
            victim: alarm_threshold(judged.credibility)
            for victim, judged in evidence.clean.victims.items()
            if judged.credibility is not None
        },
        "checks": [check._asdict() for check in checks],
    }
    table = CsvTable(NAME, LEADERBOARD, with_note(records, note))
    settings, output = without_seed(run.describe()), Path(run.experiment.output)
    board = _add_seed(output, seed, table, settings, summary)
    if results is not None:
        _add_seed(Path(results), seed, table, settings, summary)
    if not quiet:
        print_board(board, seed)
    steps.say(f"The leaderboard is in {output}")
    return steps.tell_all(run.ranks, failed(checks))


def _check_owner(results: Path, settings: dict[str, Any]) -> None:
    """Raise unless a folder has no leaderboard or this experiment's."""
    check_writable(results)
    board = read_board(results)
    if board and board.content["settings"] != settings:
        raise ValueError(
            f"Expected {results} to have no leaderboard or this experiment's, but {NAME}.json is of another"
            " experiment. Choose another folder, or delete its leaderboard."
        )


def _add_seed(
    folder: Path, seed: int, table: CsvTable, settings: dict[str, Any], summary: dict[str, Any]
) -> Board:
    """Add a seed to a folder's leaderboard over seeds."""
    with locked(folder / NAME, f"the leaderboard in {folder}"):  # which other seeds have lines in
        before = read_board(folder)
        own = {**summary, "lines": table.merge(folder, seed)}
        runs = {**(before.content["runs"] if before else {}), str(seed): own}
        content = {"settings": settings, "runs": dict(sorted(runs.items(), key=lambda run: int(run[0])))}
        write_json(folder / f"{NAME}.json", content)
        board = Board(read_csv(folder / f"{NAME}.csv"), content)
        write_page(board, folder)
    return board
