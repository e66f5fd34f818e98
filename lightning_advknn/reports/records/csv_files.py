"""Records, and the CSV files that keep them over seeds."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_advknn.reports.render.means import Mean
from lightning_advknn.storage import atomic_path, digest

Record = dict[str, str | int | float | None]
"""One line of a table: cells by column. A cell that was read back is text, and None if it is empty."""

NOTE = (
    "note"  # column for what qualifies all numbers of a record, such as the recall of approximate neighbours
)


class CsvTable(NamedTuple):
    """A table that is kept as ``<name>.csv``.

    Args:
        name: Of the file.
        columns: In the file's order; `NOTE` comes last where a record has one.
        records: The lines.
    """

    name: str
    columns: Sequence[str]
    records: Sequence[Record]

    def write(self, folder: Path) -> None:
        """Write the file."""
        write_csv(folder / f"{self.name}.csv", self._columns, self.records)

    def merge(self, folder: Path, seed: int) -> str:
        """Replace a seed's lines in a folder's file over seeds, and return their `_seed_digest`."""
        path = folder / f"{self.name}.csv"
        others = [record for record in read_csv(path) if record.get("seed") != str(seed)]
        records = sorted([*others, *self.records], key=lambda record: int(number(record, "seed")))
        write_csv(path, self._columns, records)
        return _seed_digest(path, seed)

    @property
    def _columns(self) -> Sequence[str]:
        return (*self.columns, NOTE) if any(NOTE in record for record in self.records) else self.columns


def with_note(records: Sequence[Record], note: str) -> list[Record]:
    """Records with a note, if there is one."""
    return [{**record, NOTE: note} for record in records] if note else list(records)


def number(record: Record, column: str) -> float:
    """A cell as a number."""
    return float(str(record[column]))


def mean_of(records: Iterable[Record], column: str) -> Mean:
    """A column over the seeds of one cell."""
    return Mean(tuple(number(record, column) for record in records))


def write_csv(path: Path, columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> None:
    """Write records, whole or not at all; None becomes an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read_csv(path: Path) -> list[Record]:
    """Read records that `write_csv` wrote, as text; none if there is no file.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"Expected {path} to be a table, but it is damaged: {error}.") from error
    if any(None in line or None in line.values() for line in lines):
        raise ValueError(f"Expected {path} to be a table, but it is damaged: lines differ in length.")
    return [{name: cell or None for name, cell in line.items()} for line in lines]


def _seed_digest(path: Path, seed: int) -> str:
    """Hash of a seed's lines in a file over seeds. The seed's summary keeps it."""
    return digest([line for line in read_csv(path) if line.get("seed") == str(seed)])


def check_seeds(path: Path, digests: Mapping[int, str | None]) -> None:
    """Check that a file over seeds still has the lines that the runs left there.

    Args:
        path: Of the file.
        digests: `_seed_digest` by seed, as the summaries keep it; None for an earlier version's, which kept
            none.

    Raises:
        ValueError: If lines have changed, or the file is damaged.
    """
    for seed, known in digests.items():
        if known is not None and _seed_digest(path, seed) != known:
            raise ValueError(
                f"Expected {path} to hold what the run of seed {seed} found, but it has changed since."
                " Delete its summary beside the table and run it again."
            )
