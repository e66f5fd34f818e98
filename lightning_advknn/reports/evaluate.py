"""``attack.py evaluate``: one experiment from its configuration to rows, tables and pictures."""

import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning_advknn.evaluation import Rows, summarize
from lightning_advknn.experiment import Experiment, ExperimentRun, provenance
from lightning_advknn.reports.figures import neighbours_figure, save_figure, telling_rows
from lightning_advknn.reports.files import write_rows
from lightning_advknn.reports.tables import (
    TABLE1,
    TABLE2,
    Record,
    print_table1,
    print_table2,
    read_csv,
    table1_records,
    table2_records,
    write_csv,
)
from lightning_advknn.storage import check_writable, write_json

EXPERIMENT_FILE = "experiment.json"


def prepare(experiment: Experiment, results: str | None = None) -> ExperimentRun:
    """Check an experiment and its folders, before anything long starts.

    Args:
        experiment: What to run.
        results: Folder of tables over several seeds, or None.

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
        _check_claim(folder, claim, result)
    _check_foreign(Path(experiment.output))
    for folder, claim, _ in claims:
        if _read_claim(folder) != claim:
            shutil.rmtree(folder / "rows", ignore_errors=True)  # left by a run that came to nothing
            write_json(folder / EXPERIMENT_FILE, claim)
    return run


def evaluate(run: ExperimentRun, results: str | None = None) -> None:
    """Run a prepared experiment and leave rows, tables and a picture in its output folder.

    Files: ``rows/<method>/<attack>.csv`` (one line a test image), ``table1.csv``, ``table2.csv``, ``summary.json``
    (metrics, wall time by stage, command, settings, versions, device, date), ``neighbours.png`` and ``.pdf``.

    Args:
        run: From `prepare`.
        results: Folder whose tables over several seeds get this seed's lines, and a copy of the summary.
    """
    experiment, output = run.experiment, Path(run.experiment.output)
    _ = run.surrogates  # all training first
    table2: list[Record] = []
    clean: dict[str, Rows] = {}
    metrics: dict[str, dict[str, float | None]] = {}
    for method in run.methods:
        for attack in (None, *experiment.attacks):
            rows = run.rows(method, attack)
            name = attack or "clean"
            constants = _constants(experiment, method, attack)
            write_rows(output / "rows" / method / f"{name}.csv", rows, run.backbone.layers, constants)
            table2 += table2_records(run.data.name, experiment, method, attack, rows)
            # JSON has no NaN, which means of no successes are.
            metrics[f"{method}/{name}"] = {
                key: None if math.isnan(value) else value for key, value in summarize(rows).items()
            }
            if attack is None:
                clean[method] = rows
    table1 = table1_records(run.data.name, experiment, clean)
    write_csv(output / "table1.csv", TABLE1, table1)
    write_csv(output / "table2.csv", TABLE2, table2)
    _picture(run, output / "neighbours")
    summary = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": run.describe(),
        **provenance(run.device),
        "seconds": {stage: round(seconds, 1) for stage, seconds in run.seconds().items()},
        "metrics": metrics,
    }
    write_json(output / "summary.json", summary)
    if results is not None:
        _publish(Path(results), experiment.seed, table1, table2, summary)

    print_table1(table1, f"Table 1, {run.data.name}")
    print_table2(table2, f"Table 2, {run.data.name}, seed {experiment.seed}")
    sys.stdout.write(f"Rows, tables and pictures are in {output}\n")


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
    results: Path, seed: int, table1: list[Record], table2: list[Record], summary: dict[str, Any]
) -> None:
    for name, columns, records in (("table1", TABLE1, table1), ("table2", TABLE2, table2)):
        path = results / f"{name}.csv"
        others = [record for record in read_csv(path) if record["seed"] != str(seed)]
        merged = sorted([*others, *records], key=lambda record: int(record["seed"] or 0))
        write_csv(path, columns, merged)
    write_json(results / f"seed{seed}.json", summary)


def _picture(run: ExperimentRun, path: Path) -> None:
    """Picture a few samples of the last attack through the last method."""
    method, attack = run.methods[-1], list(run.experiment.attacks)[-1]
    rows = run.rows(method, attack)
    chosen = telling_rows(rows, 4)
    images, adversarial = run.images_of(method, attack, chosen)
    figure = neighbours_figure(
        run.dknn,
        run.experiment.victim.layer,
        run.data.split("train").images,
        images,
        adversarial,
        {name: column[chosen] for name, column in rows.items()},
        f"{run.data.name}: {attack} through {method}",
    )
    save_figure(figure, path)
