"""Records as CSV files, over seeds."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_advknn.storage import atomic_path, digest

Record = dict[str, str | int | float | None]


NOTE = "note"  # column of tables that have something to say of all their numbers, such as the recall of approximate neighbours


def with_note(records: Sequence[Record], note: str) -> list[Record]:
    """Records with a note, if there is one."""
    return [{**record, NOTE: note} for record in records] if note else list(records)


def with_note_column(columns: Sequence[str], records: Sequence[Record]) -> Sequence[str]:
    """Columns of records that may have a note."""
    return (*columns, NOTE) if any(NOTE in record for record in records) else columns


def write_csv(path: Path, columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> None:
    """Write a table, whole or not at all; None becomes an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read_csv(path: Path) -> list[Record]:
    """Read a table that `write_csv` wrote; cells are text, empty ones None.

    Raises:
        ValueError: If it is no such table.
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


def seed_digest(path: Path, seed: int) -> str:
    """Hash of a seed's lines in a table over seeds, by which its summary knows them."""
    return digest([line for line in read_csv(path) if line.get("seed") == str(seed)])


def check_seeds(path: Path, digests: Mapping[int, str | None]) -> None:
    """Raise a ValueError unless seeds' lines in a table are those that their runs left there.

    Args:
        path: Of the table.
        digests: `seed_digest` by seed, as it was then; None of an earlier version's run, which kept none.
    """
    for seed, known in digests.items():
        if known is not None and seed_digest(path, seed) != known:
            raise ValueError(
                f"Expected {path} to hold what the run of seed {seed} found, but it has changed since. Delete its summary"
                " beside the table and run it again."
            )


def merge_csv(path: Path, columns: Sequence[str], records: Iterable[Record], seed: int) -> None:
    """Put a seed's lines into a table over seeds, in place of those it has there."""
    others = [record for record in read_csv(path) if record.get("seed") != str(seed)]
    write_csv(path, columns, sorted([*others, *records], key=lambda record: int(str(record["seed"]))))
