"""CSV files give back what was written, and keep other seeds."""

from pathlib import Path

import pytest

from lightning_advknn.reports.records.csv_files import (
    NOTE,
    CsvTable,
    Record,
    _seed_digest,
    read_csv,
    with_note,
    write_csv,
)


def test_csv_reads_back(tmp_path: Path) -> None:
    assert read_csv(tmp_path / "none.csv") == []
    write_csv(tmp_path / "t.csv", ("a", "b"), [{"a": 1, "b": None}, {"a": "x,y", "b": 2.5}])
    assert read_csv(tmp_path / "t.csv") == [{"a": "1", "b": None}, {"a": "x,y", "b": "2.5"}]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]  # and no temporary file


def of_seed(seed: int, *accuracies: float | None) -> CsvTable:
    records: list[Record] = [{"victim": "knn", "accuracy": accuracy, "seed": seed} for accuracy in accuracies]
    return CsvTable("t", ("victim", "accuracy", "seed"), records)


def test_a_seeds_lines_replace_its_own_and_leave_the_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    # Written by hand: numbers that Python would write otherwise stay as they are.
    path.write_text("victim,accuracy,seed\nknn,50.10,2\nknn,0.50,10\n")
    first = of_seed(3, 1.5, None).merge(tmp_path, 3)
    assert first == _seed_digest(path, 3)
    whole = "victim,accuracy,seed\nknn,50.10,2\nknn,1.5,3\nknn,,3\nknn,0.50,10\n"
    assert path.read_text() == whole
    assert of_seed(3, 2.5).merge(tmp_path, 3) != first
    assert path.read_text() == whole.replace("knn,1.5,3\nknn,,3", "knn,2.5,3")
    of_seed(3, 1.5, None).merge(tmp_path, 3)
    assert path.read_text() == whole


def test_a_note_is_a_column_of_its_own(tmp_path: Path) -> None:
    table = of_seed(0, 1.0)
    assert with_note(table.records, "") == table.records
    table._replace(records=with_note(table.records, "about")).write(tmp_path)
    assert [line[NOTE] for line in read_csv(tmp_path / "t.csv")] == ["about"]
    with pytest.raises(ValueError, match=NOTE):  # tables with and without one do not mix
        of_seed(1, 1.0).merge(tmp_path, 1)
