"""``attack.py evaluate``: one experiment from its configuration to rows, tables and pictures."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_advknn import command_line
from lightning_advknn.commands import steps
from lightning_advknn.commands.measured import Measured, print_tables
from lightning_advknn.commands.pictures import draw
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.leaderboards.checks import counted, failed
from lightning_advknn.reports.records.classes import classes_line, names_of
from lightning_advknn.reports.records.csv_files import CsvTable
from lightning_advknn.reports.records.folders import Claim, take, without_seed
from lightning_advknn.storage import atomic_path, locked, write_json


def prepare(
    experiment: Experiment, results: str | None = None, replace: bool = False, ranks: Ranks | None = None
) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of tables over several seeds, or None.
        replace: Delete results of other experiments in the folders instead of raising an error.
        ranks: Processes that share the work. Only the first checks the folders.

    Raises:
        ValueError: If the experiment cannot work, or a folder holds other results or files.
        OSError: If a file is missing or a folder cannot be written.
        ImportError: If the search backend is not installed.
    """
    run = ExperimentRun(experiment, ranks)
    if run.ranks.rank == 0:
        settings = steps.settings_of(run)
        claims = [steps.output_claim(run, settings)]
        if results is not None:
            claims.append(Claim(Path(results), without_seed(settings), ("table1.csv",)))
        take(claims, replace)
    return run


def evaluate(
    run: ExperimentRun, results: str | None = None, command: str | None = None, quiet: bool = False
) -> list[str]:
    """Run a prepared experiment and leave rows, tables and pictures in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``table1.csv``, ``table2.csv``,
    ``summary.json`` (metrics, distributions of credibility, checks, classes, wall time by stage, command,
    settings, versions, device, date), and as PNG and PDF ``neighbours`` and, if an attack function has
    several eps, ``adversarials``. With transfer networks also ``rows/<network>/<method>/<attack>.csv`` and
    ``table3.csv``. With several ranks, all call this and the first writes.

    Args:
        run: From `prepare`.
        results: Folder of tables over several seeds, which get this seed's lines; also of copies of the
            summary and the pictures.
        command: What the summary names as the command; None for this process's own.
        quiet: Print only where the results are.

    Returns:
        A line for each check that fails.
    """
    if not run.fill():
        return steps.tell_all(run.ranks)
    steps.say(classes_line(run.data), quiet)
    output, measured = Path(run.experiment.output), Measured(run)
    evidence = steps.gather(run, run.attacks, measured.add)
    pictures = draw(run, measured.pictured, measured.pictured_rows, output)
    checks = evidence.checks(names_of(run.data))
    tables = measured.tables()
    for table in tables:
        table.write(output)
    summary = {
        "command": command or command_line.command(),
        "settings": run.describe(),
        **steps.about(run),
        "checks": [check._asdict() for check in checks],
        "seconds": steps.seconds_of(run),
        "pieces": run.cache.pieces(),
        **steps.approximations_of(run),
        "metrics": measured.metrics,
        "credibility": measured.credibility,
    }
    write_json(output / "summary.json", summary)
    if results is not None:
        _publish(Path(results), run.experiment.seed, tables, summary, pictures)
    if not quiet:
        print_tables(run, tables)
    steps.say(counted(checks), quiet)
    steps.say(f"Rows, tables and pictures are in {output}")
    return steps.tell_all(run.ranks, failed(checks))


def _publish(
    results: Path, seed: int, tables: Sequence[CsvTable], summary: dict[str, Any], pictures: Sequence[Path]
) -> None:
    """Add a seed to a folder's tables over seeds, with its summary and pictures."""
    for picture in pictures:
        with atomic_path(results / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
    with locked(results / "tables", f"tables in {results}"):  # which other seeds have lines in
        digests = {table.name: table.merge(results, seed) for table in tables}
    write_json(results / f"seed{seed}.json", {**summary, "tables": digests})
