"""``attack.py evaluate``: one experiment from its configuration to rows, tables and pictures."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.checking import Checking, failed, tell, told_by_first
from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, Experiment
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.paper.chosen_images import draw
from lightning_advknn.reports.records.classes import classes_line, classes_of
from lightning_advknn.reports.records.csv_files import (
    Record,
    merge_csv,
    seed_digest,
    with_note,
    with_note_column,
    write_csv,
)
from lightning_advknn.reports.records.folders import Claim, take, without_seed
from lightning_advknn.reports.records.paper_records import (
    TABLE1,
    TABLE2,
    TABLE3,
    table1_records,
    table2_records,
    table3_records,
)
from lightning_advknn.reports.records.rows_files import saved_rows
from lightning_advknn.reports.records.summary import (
    approximations_of,
    credibility_of,
    metrics_of,
    notes_of,
    which_images,
)
from lightning_advknn.reports.render.terminal import print_table1, print_table2, print_table3
from lightning_advknn.storage import atomic_path, locked, write_json

Table = tuple[str, Sequence[str], list[Record]]
"""Name, columns, records."""


def prepare(
    experiment: Experiment, results: str | None = None, replace: bool = False, ranks: Ranks | None = None
) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of tables over several seeds, or None.
        replace: Delete what folders hold of other experiments, instead of raising an error.
        ranks: Processes that share the work; the first alone looks at the folders.

    Raises:
        ValueError: If anything in the experiment cannot work, or a folder holds something else.
        OSError: If a file is missing or a folder cannot be written.
        ImportError: If the search backend is not installed.
    """
    run = ExperimentRun(experiment, ranks)
    if run.ranks.rank:
        return run
    settings = json.loads(json.dumps(run.describe()))  # as it reads back
    claims = [Claim(Path(experiment.output), settings, ("summary.json", "leaderboard.csv"), own=True)]
    if results is not None:
        claims.append(Claim(Path(results), without_seed(settings), ("table1.csv",)))
    take(claims, replace)
    return run


def evaluate(run: ExperimentRun, results: str | None = None, command: str | None = None) -> list[str]:
    """Run a prepared experiment and leave rows, tables and pictures in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``table1.csv``, ``table2.csv``,
    ``summary.json`` (metrics, distributions of credibility, checks, classes, wall time by stage, command,
    settings, versions, device, date), and as PNG and PDF ``neighbours`` and, if an attack function has
    several eps, ``adversarials``. With transfer networks also ``rows/<network>/<method>/<attack>.csv`` and
    ``table3.csv``. Of several ranks, all call this and the first writes.

    Args:
        run: From `prepare`.
        results: Folder whose tables over several seeds get this seed's lines, and copies of summary and pictures.
        command: What the summary says made it; None for this process's own.

    Returns:
        A line for each check that does not hold.
    """
    experiment, output = run.experiment, Path(run.experiment.output)
    if not run.fill():
        return told_by_first(run.ranks)
    sys.stdout.write(f"{classes_line(run.data)}\n")
    table2: list[Record] = []
    clean: dict[str, Rows] = {}
    last: dict[str, Rows] = {}  # on what is pictured
    metrics, credibility = {}, {}
    pictured = [method for method, attack in run.attacks if attack][-1]
    for method, attack in run.attacks:
        rows = saved_rows(run, method, attack)
        table2 += table2_records(run.data.name, experiment, method, attack, rows)
        name = f"{method}/{attack or 'clean'}"
        metrics[name], credibility[name] = metrics_of(rows), credibility_of(rows)
        if attack is None:
            clean[method] = rows
            if method == ORIGIN:  # which comes first
                checking = Checking(run, rows)
        else:
            checking.add(method, attack, rows)
        if attack is None or method == pictured:
            last[attack or "clean"] = rows
    table1 = table1_records(run.data.name, experiment, clean)
    pictures = draw(run, pictured, last, output)
    checks = checking.checks()
    run.attacked.free()
    note = notes_of(run.attacked)
    table1, table2, table3 = with_note(table1, note), with_note(table2, note), _transferred(run)
    tables: list[Table] = [
        (name, with_note_column(columns, records), records)
        for name, columns, records in (
            ("table1", TABLE1, table1),
            ("table2", TABLE2, table2),
            ("table3", TABLE3, table3),
        )
        if records
    ]
    for name, columns, records in tables:
        write_csv(output / f"{name}.csv", columns, records)
    summary: dict[str, Any] = {
        "command": command or shlex.join(["python", *sys.argv]),
        "settings": run.describe(),
        **provenance(run.device),
        "images": len(run.test),
        "classes": classes_of(run),
        "checks": [check._asdict() for check in checks],
        "seconds": {stage: round(seconds, 1) for stage, seconds in run.cache.seconds().items()},
        "pieces": run.cache.pieces(),
        **approximations_of(run),
        "metrics": metrics,
        "credibility": credibility,
    }
    write_json(output / "summary.json", summary)
    if results is not None:
        _publish(Path(results), experiment.seed, tables, summary, pictures)
    settings, note = summary["settings"], note and f"\n{note}"
    which = f"\n{which_images(settings, len(run.test))}" if "images" in settings else ""
    print_table1(table1, f"Table 1, {run.data.name}{which}{note}")
    print_table2(table2, f"Table 2, {run.data.name}, seed {experiment.seed}{which}{note}")
    if table3:
        print_table3(table3, f"Table 3, {run.data.name}, seed {experiment.seed}{which}")
    tell(checks, sys.stdout.write)
    sys.stdout.write(f"Rows, tables and pictures are in {output}\n")
    return told_by_first(run.ranks, failed(checks))


def _transferred(run: ExperimentRun) -> list[Record]:
    """Table 3: the transfer networks on what was made for the attacked one."""
    records = []
    for network, victims in run.transfers.items():
        for method, attack in ((ORIGIN, None), *(pair for pair in run.attacks if pair[1])):
            rows = saved_rows(run, method, attack, network)
            note = notes_of(victims)
            own = table3_records(run.data.name, run.experiment, network, method, attack, rows)
            records += with_note(own, note)
        victims.free()
    return records


def _publish(
    results: Path, seed: int, tables: Sequence[Table], summary: dict[str, Any], pictures: Sequence[Path]
) -> None:
    for picture in pictures:
        with atomic_path(results / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
    with locked(results / "tables", f"tables in {results}"):  # which other seeds have lines in
        for name, columns, records in tables:
            merge_csv(results / f"{name}.csv", columns, records, seed)
        kept = {name: seed_digest(results / f"{name}.csv", seed) for name, _, _ in tables}
    write_json(results / f"seed{seed}.json", {**summary, "tables": kept})
