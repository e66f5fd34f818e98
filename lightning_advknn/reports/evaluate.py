"""``attack.py evaluate``: one experiment from its configuration to rows, tables and pictures."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment import ORIGIN, Experiment, ExperimentRun, provenance
from lightning_advknn.reports.files import write_rows
from lightning_advknn.reports.pictures import draw
from lightning_advknn.reports.summary import credibility_of, metrics_of
from lightning_advknn.reports.tables import (
    TABLE1,
    TABLE2,
    TABLE3,
    Record,
    print_table1,
    print_table2,
    print_table3,
    read_csv,
    table1_records,
    table2_records,
    table3_records,
    write_csv,
)
from lightning_advknn.storage import atomic_path, check_writable, write_json

EXPERIMENT_FILE = "experiment.json"

Table = tuple[str, Sequence[str], list[Record]]
"""Name, columns, records."""


def prepare(experiment: Experiment, results: str | None = None, replace: bool = False) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of tables over several seeds, or None.
        replace: Delete what folders hold of other experiments, instead of raising an error.

    Raises:
        ValueError: If anything in the experiment cannot work, or a folder holds something else.
        OSError: If a file is missing or a folder cannot be written.
        ImportError: If the search backend is not installed.
    """
    run = ExperimentRun(experiment)
    settings = json.loads(json.dumps(run.describe()))  # as it reads back
    claims = [(Path(experiment.output), settings, "summary.json")]
    if results is not None:
        claims.append((Path(results), _without_seed(settings), "table1.csv"))
    for folder, claim, result in claims:
        check_writable(folder)
        if replace and _read_claim(folder) not in (None, claim):
            _clear(folder)
        _check_claim(folder, claim, result)
    _check_foreign(Path(experiment.output))
    for folder, claim, _ in claims:
        if _read_claim(folder) != claim:
            _clear(folder)  # left by a run that came to nothing
            write_json(folder / EXPERIMENT_FILE, claim)
    return run


def evaluate(run: ExperimentRun, results: str | None = None, command: str | None = None) -> None:
    """Run a prepared experiment and leave rows, tables and pictures in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``table1.csv``, ``table2.csv``, ``summary.json``
    (metrics, distributions of credibility, wall time by stage, command, settings, versions, device, date), and as PNG and PDF
    ``neighbours`` and, if an attack function has several eps, ``adversarials``. With transfer networks also
    ``rows/<network>/<method>/<attack>.csv`` and ``table3.csv``.

    Args:
        run: From `prepare`.
        results: Folder whose tables over several seeds get this seed's lines, and copies of summary and pictures.
        command: What the summary says made it; None for this process's own.
    """
    experiment, output = run.experiment, Path(run.experiment.output)
    run.train()
    table2: list[Record] = []
    clean: dict[str, Rows] = {}
    last: dict[str, Rows] = {}  # on what is pictured
    metrics, credibility = {}, {}
    pictured = [method for method, attack in run.attacks if attack][-1]
    for method, attack in run.attacks:
        rows = _rows(run, method, attack)
        table2 += table2_records(run.data.name, experiment, method, attack, rows)
        name = f"{method}/{attack or 'clean'}"
        metrics[name], credibility[name] = metrics_of(rows), credibility_of(rows)
        if attack is None:
            clean[method] = rows
        if attack is None or method == pictured:
            last[attack or "clean"] = rows
    table1 = table1_records(run.data.name, experiment, clean)
    pictures = draw(run, pictured, last, output)
    run.attacked.free()
    tables: list[Table] = [("table1", TABLE1, table1), ("table2", TABLE2, table2)]
    table3 = _transferred(run)
    if table3:
        tables.append(("table3", TABLE3, table3))
    for name, columns, records in tables:
        write_csv(output / f"{name}.csv", columns, records)
    summary = {
        "command": command or shlex.join(["python", *sys.argv]),
        "settings": run.describe(),
        **provenance(run.device),
        "images": len(run.test),
        "seconds": {stage: round(seconds, 1) for stage, seconds in run.cache.seconds().items()},
        "pieces": run.cache.pieces(),
        "metrics": metrics,
        "credibility": credibility,
    }
    write_json(output / "summary.json", summary)
    if results is not None:
        _publish(Path(results), experiment.seed, tables, summary, pictures)
    print_table1(table1, f"Table 1, {run.data.name}")
    print_table2(table2, f"Table 2, {run.data.name}, seed {experiment.seed}")
    if table3:
        print_table3(table3, f"Table 3, {run.data.name}, seed {experiment.seed}")
    sys.stdout.write(f"Rows, tables and pictures are in {output}\n")


def _rows(run: ExperimentRun, method: str, attack: str | None, network: str | None = None) -> Rows:
    """Rows of one attack through one method, judged by a network's victims, which are also written to a file."""
    rows = run.rows(method, attack, network)
    victims = run.transfers[network] if network else run.attacked
    constants = _constants(run.experiment, method, attack)
    if network:
        constants = {"network": network, **constants}
    folder = Path(run.experiment.output) / "rows" / (network or "") / method
    write_rows(folder / f"{attack or 'clean'}.csv", rows, victims.network.layers, constants)
    return rows


def _transferred(run: ExperimentRun) -> list[Record]:
    """Table 3: the transfer networks on what was made for the attacked one."""
    records = []
    for network, victims in run.transfers.items():
        for method, attack in ((ORIGIN, None), *(pair for pair in run.attacks if pair[1])):
            rows = _rows(run, method, attack, network)
            records += table3_records(run.data.name, run.experiment, network, method, attack, rows)
        victims.free()
    return records


def _constants(experiment: Experiment, method: str, attack: str | None) -> dict[str, object]:
    used = experiment.attacks[attack] if attack else None
    return {
        "method": method,
        "attack": attack or "clean",
        "settings": " ".join(f"{k}={v}" for k, v in used.settings.items()) if used else "",
        "precision": used.precision if used else "",
        "label_source": experiment.label_source,
        "convention": experiment.victim.convention,
        "seed": experiment.seed,
    }


def _check_claim(folder: Path, settings: dict[str, Any], result: str) -> None:
    """Raise a ValueError if a folder holds another experiment's results."""
    # A claim without a result was left by a run that came to nothing.
    if (folder / result).is_file() and _read_claim(folder) != settings:
        raise ValueError(
            f"Expected {folder} to be empty or to hold this experiment's results, but its {EXPERIMENT_FILE} is of"
            " another experiment. Choose another folder, or delete this one."
        )


def _clear(folder: Path) -> None:
    """Delete what an experiment left in its folder, and nothing else."""
    shutil.rmtree(folder / "rows", ignore_errors=True)
    for pattern in (
        EXPERIMENT_FILE,
        "table?.csv",
        "seed*.json",
        "summary.json",
        "neighbours.*",
        "adversarials.*",
    ):
        for path in folder.glob(pattern):
            path.unlink()


def _read_claim(folder: Path) -> Any:
    """The settings of the experiment whose folder this is; None if it is nobody's."""
    try:
        return json.loads((folder / EXPERIMENT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _check_foreign(output: Path) -> None:
    """Raise a ValueError if an output folder holds files, but no experiment."""
    if any(output.iterdir()) and not (output / EXPERIMENT_FILE).is_file():
        raise ValueError(
            f"Expected {output} to be empty or to hold this experiment's results, but it holds other files. Choose"
            " another folder."
        )


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    trainings = {
        name: {key: value for key, value in training.items() if key != "seed_everything"}
        for name, training in settings["trainings"].items()
    }
    return {**settings, "trainings": trainings}


def _publish(
    results: Path, seed: int, tables: Sequence[Table], summary: dict[str, Any], pictures: Sequence[Path]
) -> None:
    for picture in pictures:
        with atomic_path(results / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
    for name, columns, records in tables:
        path = results / f"{name}.csv"
        others = [record for record in read_csv(path) if record["seed"] != str(seed)]
        merged = sorted([*others, *records], key=lambda record: int(record["seed"] or 0))
        write_csv(path, columns, merged)
    write_json(results / f"seed{seed}.json", summary)
