"""``attack.py leaderboard``: every attack beside every other, against every victim."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from lightning_advknn.experiment.checking import Checking, failed, told_by_first
from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, Experiment
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.leaderboards.attack_runs import FALSE_ALARMS, alarm_threshold
from lightning_advknn.reports.leaderboards.board import NAME, Board, read_board
from lightning_advknn.reports.leaderboards.page import print_board, write_page
from lightning_advknn.reports.leaderboards.records import LEADERBOARD, leaderboard_records
from lightning_advknn.reports.records.classes import classes_line, classes_of
from lightning_advknn.reports.records.csv_files import (
    Record,
    merge_csv,
    read_csv,
    seed_digest,
    with_note,
    with_note_column,
)
from lightning_advknn.reports.records.folders import Claim, take, without_seed
from lightning_advknn.reports.records.rows_files import saved_rows
from lightning_advknn.reports.records.summary import approximations_of, notes_of
from lightning_advknn.storage import check_writable, locked, write_json


def prepare_leaderboard(
    experiment: Experiment, results: str | None = None, ranks: Ranks | None = None
) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of a leaderboard over several seeds, or None.
        ranks: Processes that share the work; the first alone looks at the folders.

    Raises:
        ValueError: If anything in the experiment cannot work, or a folder holds something else.
        OSError: If a file is missing or a folder cannot be written.
        ImportError: If the search backend or an attack's library is not installed.
    """
    if experiment.transfer:
        raise ValueError(
            f"Expected no `transfer` in a leaderboard, but got {list(experiment.transfer)}. `attack.py evaluate` has other"
            " networks judge."
        )
    for attack in experiment.attacks.values():
        _ = attack.measure
    if experiment.victim.shard and experiment.victim.metric == "euclidean":
        raise ValueError(
            "Expected no `victim.shard` in a leaderboard of a Euclidean kNN, whose lower bounds read the whole bank. Switch it"
            " off, and lower `memory_gib` if the bank does not fit."
        )
    run = ExperimentRun(experiment, ranks)
    if run.ranks.rank:
        return run
    settings = json.loads(json.dumps(run.describe()))  # as it reads back
    if results is not None:
        check_writable(Path(results))
        board = read_board(Path(results))
        if board and board.content["settings"] != without_seed(settings):
            raise ValueError(
                f"Expected {results} to have no leaderboard or this experiment's, but {NAME}.json is of another"
                " experiment. Choose another folder, or delete its leaderboard."
            )
    take([Claim(Path(experiment.output), settings, ("summary.json", f"{NAME}.csv"), own=True)])
    return run


def leaderboard(run: ExperimentRun, results: str | None = None) -> list[str]:
    """Run a prepared experiment and leave a leaderboard in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``leaderboard.csv`` (columns `LEADERBOARD`),
    ``leaderboard.json`` (settings; by seed: checks, thresholds of credibility, wall time by stage, command, versions, device,
    date), the same for reading as ``leaderboard.md``, and as PNG and PDF curves of accuracy against true L2. Of several ranks,
    all call this and the first writes.

    Args:
        run: From `prepare_leaderboard`.
        results: Folder whose leaderboard over several seeds gets this seed's lines.

    Returns:
        A line for each check that does not hold.
    """
    experiment, output = run.experiment, Path(run.experiment.output)
    if not run.fill(bounds=True):
        return told_by_first(run.ranks)
    sys.stdout.write(f"{classes_line(run.data)}\n")
    checking = Checking(run, saved_rows(run, ORIGIN, None))
    for method, attack in run.attacks:
        if attack is not None:
            checking.add(method, attack, saved_rows(run, method, attack))
    bounds, runs, clean = run.bounds(), checking.runs, checking.clean
    note = notes_of(run.attacked)
    run.attacked.free()
    records = with_note(leaderboard_records(runs, clean, experiment.seed, bounds), note)
    checks = checking.checks(bounds)
    summary = {
        "command": shlex.join(["python", *sys.argv]),
        **provenance(run.device),
        "images": len(run.test),
        "classes": classes_of(run),
        "seconds": {stage: round(seconds, 1) for stage, seconds in run.cache.seconds().items()},
        **approximations_of(run),
        "false_alarms": FALSE_ALARMS,
        "thresholds": {
            victim: alarm_threshold(judged.credibility)
            for victim, judged in clean.victims.items()
            if judged.credibility is not None
        },
        "checks": [check._asdict() for check in checks],
    }
    content = {"settings": without_seed(run.describe()), "runs": {str(experiment.seed): summary}}
    board = _publish(output, experiment.seed, records, content)
    if results is not None:
        _publish(Path(results), experiment.seed, records, content)
    print_board(board, experiment.seed)
    sys.stdout.write(f"The leaderboard is in {output}\n")
    return told_by_first(run.ranks, failed(checks))


def _publish(folder: Path, seed: int, records: list[Record], content: dict[str, Any]) -> Board:
    """Put a seed into a folder's leaderboard over seeds."""
    with locked(folder / NAME, f"the leaderboard in {folder}"):  # which other seeds have lines in
        before = read_board(folder)
        table = folder / f"{NAME}.csv"
        merge_csv(table, with_note_column(LEADERBOARD, records), records, seed)
        own = {**content["runs"][str(seed)], "lines": seed_digest(table, seed)}
        runs = {**(before.content["runs"] if before else {}), str(seed): own}
        ordered = dict(sorted(runs.items(), key=lambda run: int(run[0])))
        write_json(folder / f"{NAME}.json", {**content, "runs": ordered})
        board = Board(read_csv(table), {**content, "runs": ordered})
        write_page(board, folder)
    return board
