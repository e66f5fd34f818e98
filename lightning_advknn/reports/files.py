"""Per-sample rows as CSV files."""

from pathlib import Path

from torch import Tensor

from lightning_advknn.evaluation import Rows
from lightning_advknn.reports.tables import write_csv


def write_rows(path: Path, rows: Rows, layers: tuple[str, ...], settings: dict[str, object]) -> None:
    """Write one line a sample; an integer column of votes a layer holds its C counts separated by spaces.

    Args:
        path: CSV file.
        rows: As `evaluation.make_rows` returns them.
        layers: Names for votes' second dimension.
        settings: Columns that are the same on each line: method, attack, its settings and precision, label
            source, convention.
    """
    columns: dict[str, list[object]] = {}
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


def _counts(votes: Tensor) -> str:
    return " ".join(str(count) for count in votes.tolist())
