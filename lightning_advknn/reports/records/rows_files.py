"""Per-sample rows as CSV files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records.csv_files import NOTE, write_csv
from lightning_advknn.reports.records.summaries import neighbours_sentence


def write_rows(
    path: Path,
    rows: Rows,
    layers: Sequence[str],
    constants: Mapping[str, object],
    files: Sequence[str] | None = None,
) -> None:
    """Write one line a sample. A layer's votes are one column of C counts, separated by spaces.

    Args:
        path: CSV file.
        rows: As `evaluation.make_rows` returns them.
        layers: Names of the votes' layers.
        constants: Columns that are the same on each line, as `constants_of`.
        files: Of data that are files, each image's path below the data's root.
    """
    columns: dict[str, list[object]] = {} if files is None else {"file": list(files)}
    for name, column in rows.items():
        if name.startswith("votes_"):
            for position, layer in enumerate(layers):
                columns[f"{name}_{layer}"] = [_counts(votes) for votes in column[:, position]]
        else:
            columns[name] = column.tolist()
    lines = (
        {**constants, **dict(zip(columns, values, strict=True))}
        for values in zip(*columns.values(), strict=True)
    )
    write_csv(path, [*constants, *columns], lines)


def constants_of(
    experiment: Experiment,
    method: str,
    attack: str | None,
    network: str | None = None,
    approximation: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """Columns that all rows of an attack share: what was attacked, and the settings.

    Args:
        experiment: Its settings.
        method: What was attacked.
        attack: Name of the attack; None leaves the images as they are.
        network: The transfer network that judges; None for the attacked one.
        approximation: How that network's neighbours were approximated, as in `neighbours_sentence`.
    """
    used = experiment.attacks[attack] if attack else None
    return {
        **({"network": network} if network else {}),
        "method": method,
        "attack": attack or "clean",
        "settings": " ".join(f"{k}={v}" for k, v in used.settings.items()) if used else "",
        "precision": used.precision if used else "",
        "label_source": experiment.label_source,
        "convention": experiment.victim.convention,
        "seed": experiment.seed,
        **({NOTE: neighbours_sentence(approximation)} if approximation else {}),
    }


def _counts(votes: Tensor) -> str:
    return " ".join(str(count) for count in votes.tolist())
