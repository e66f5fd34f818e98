"""Per-sample rows as CSV files."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_advknn.data.files import ImageFiles
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records.csv_files import NOTE, write_csv
from lightning_advknn.reports.records.summary import neighbours_sentence


def saved_rows(run: ExperimentRun, method: str, attack: str | None, network: str | None = None) -> Rows:
    """Rows of an experiment, as `ExperimentRun.rows`, which are also written into its output folder.

    The file is ``rows/[<network>/]<method>/<attack>.csv``.
    """
    rows = run.rows(method, attack, network)
    victims = run.transfers[network] if network else run.attacked
    constants = _constants(run.experiment, method, attack)
    if network:
        constants = {"network": network, **constants}
    if victims.approximation:
        constants[NOTE] = neighbours_sentence(victims.approximation)
    folder = Path(run.experiment.output) / "rows" / (network or "") / method
    images = run.test.images
    files = images.names if isinstance(images, ImageFiles) else None
    write_rows(folder / f"{attack or 'clean'}.csv", rows, victims.layers, constants, files)
    return rows


def write_rows(
    path: Path,
    rows: Rows,
    layers: tuple[str, ...],
    settings: dict[str, object],
    files: Sequence[str] | None = None,
) -> None:
    """Write one line a sample; an integer column of votes a layer holds its C counts separated by spaces.

    Args:
        path: CSV file.
        rows: As `evaluation.make_rows` returns them.
        layers: Names for votes' second dimension.
        settings: Columns that are the same on each line: method, attack, its settings and precision, label
            source, convention.
        files: Of data that are files, each image's path below the data's root.
    """
    columns: dict[str, list[object]] = {} if files is None else {"file": list(files)}
    for name, column in rows.items():
        if name.startswith("votes_"):
            for position, layer in enumerate(layers):
                columns[f"{name}_{layer}"] = [_counts(votes) for votes in column[:, position]]
        else:
            columns[name] = column.tolist()
    names = [*settings, *columns]
    lines = (
        dict(zip(names, [*settings.values(), *values], strict=True))
        for values in zip(*columns.values(), strict=True)
    )
    write_csv(path, names, lines)


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


def _counts(votes: Tensor) -> str:
    return " ".join(str(count) for count in votes.tolist())
