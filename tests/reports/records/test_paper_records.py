"""Tables 1 to 3 from rows that are worked by hand."""

from typing import Any

import pytest

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment, VictimSettings
from lightning_advknn.reports.records.paper_records import (
    COLUMNS,
    attacked_records,
    clean_records,
    shown,
    transfer_records,
)
from lightning_advknn.reports.render.terminal import print_table

BIM = {"eps": 0.25, "step_size": 0.01, "steps": 100}


def experiment(seed: int = 0, **victim: Any) -> Experiment:
    attacks = {"bim": AttackSettings("bim", dict(BIM))}
    return Experiment(
        backbone=None, surrogates={}, attacks=attacks, victim=VictimSettings(**victim), seed=seed
    )


def test_table2_by_hand(rows: Rows) -> None:
    knn, dknn = attacked_records("MNIST", experiment(3), "dknnb_cl", "bim", rows)
    common = {"method": "dknnb_cl", "attack": "bim", "eps": 0.25, "l2_mean": 2.5, "n": 4, "seed": 3}
    assert knn == {
        "victim": "knn",
        "accuracy": 50.0,
        "paper": 1.03,
        "l2_mean_success": 3.5,
        "credibility_mean": 0.25,
        **common,
    }
    # No success: no mean distortion of successes.
    assert dknn == {
        "victim": "dknn",
        "accuracy": 100.0,
        "paper": 5.97,
        "l2_mean_success": None,
        "credibility_mean": 0.375,
        **common,
    }
    assert set(knn) == set(COLUMNS["table2"])


def test_table1_by_hand(rows: Rows) -> None:
    plain = {name: column for name, column in rows.items() if not name.startswith("surrogate")}
    records = clean_records("MNIST", experiment(), {"origin": plain, "dknnb": rows})
    assert [(r["victim"], r["accuracy"], r["paper"]) for r in records] == [
        ("dnn", 25.0, 99.17),
        ("knn", 50.0, 98.98),
        ("dknn", 100.0, 98.89),
        ("dknnb", 25.0, 98.75),
    ]


def test_table3_by_hand(rows: Rows) -> None:
    records = transfer_records("MNIST", experiment(3), "lenet5", "dknnb_cl", "bim", rows)
    common = {"network": "lenet5", "method": "dknnb_cl", "attack": "bim", "eps": 0.25, "l2_mean": 2.5}
    for record, victim, accuracy, papers in zip(
        records, ("dnn", "knn", "dknn"), (25.0, 50.0, 100.0), (47.55, 56.37, 70.04), strict=True
    ):
        found = {"victim": victim, "accuracy": accuracy, "paper": papers, "n": 4, "seed": 3}
        assert record == common | found
        assert set(record) == set(COLUMNS["table3"])
    for record in transfer_records("MNIST", experiment(), "lenet5", "origin", None, rows):
        assert (record["attack"], record["eps"], record["paper"]) == ("clean", 0, None)


def test_tables_are_printed_with_the_papers_beside(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    clean = {**rows, "knn_after": rows["knn_before"]}
    records = {
        "table1": clean_records("MNIST", experiment(), {"origin": rows}),
        "table2": [
            *attacked_records("MNIST", experiment(), "origin", None, clean),
            *attacked_records("MNIST", experiment(), "origin", "bim", rows),
            *attacked_records("MNIST", experiment(), "mine", "bim", rows),
        ],
        "table3": transfer_records("MNIST", experiment(), "lenet5", "origin", "bim", rows),
    }
    for name, own in records.items():
        print_table(shown(name, own, f"{name}, accuracy in [0, 100]"))
    told = " ".join(capsys.readouterr().out.split())
    assert "table1, accuracy in [0, 100] seed dnn knn dknn origin 0 25.00 (99.17) 50.00 (98.98)" in told
    assert "knn origin 75.00 (98.98) 50.00 (2.14) L2 2.50 cred. 0.25" in told
    assert "knn mine - 50.00 L2 2.50 cred. 0.25" in told
    assert "lenet5 bim origin 25.00 (47.46) 50.00 (59.72) 100.00 (72.61)" in told
