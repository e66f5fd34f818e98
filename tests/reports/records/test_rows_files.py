"""Per-sample rows as CSV files."""

from pathlib import Path

from lightning_advknn.evaluation import Rows
from lightning_advknn.reports.records.csv_files import read_csv
from lightning_advknn.reports.records.rows_files import write_rows


def test_rows_as_csv(rows: Rows, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", rows, ("relu3", "logits"), {"method": "origin", "attack": "bim"})
    lines = read_csv(tmp_path / "rows.csv")
    assert len(lines) == 4
    last = lines[3]
    assert (last["method"], last["attack"]) == ("origin", "bim")
    assert (last["id"], last["label"], last["knn_after"], last["l2"]) == ("3", "1", "0", "4.0")
    assert (last["votes_after_relu3"], last["votes_after_logits"]) == ("3 0", "2 1")
