"""Tables 1 to 3 from rows that are worked by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment, VictimSettings
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import read_csv, write_csv
from lightning_advknn.reports.records.paper_records import (
    TABLE2,
    TABLE3,
    attacked_records,
    clean_records,
    transfer_records,
)
from lightning_advknn.reports.records.rows_files import write_rows
from lightning_advknn.reports.render.terminal import print_table1, print_table2, print_table3

BIM = {"eps": 0.25, "step_size": 0.01, "steps": 100}
VICTIM = {"layer": "relu3", "k": 75, "metric": "cosine"}


def experiment(seed: int = 0, **victim: Any) -> Experiment:
    attacks = {"bim": AttackSettings("bim", dict(BIM))}
    return Experiment(
        backbone=None, surrogates={}, attacks=attacks, victim=VictimSettings(**victim), seed=seed
    )


@pytest.fixture
def rows() -> Rows:
    """Four images: kNN is wrong on the last two after the attack, DkNN on none."""
    votes = torch.tensor([[[3, 0], [2, 1]]]).expand(4, 2, 2)
    return {
        "id": torch.arange(4),
        "label": torch.tensor([0, 0, 1, 1]),
        "l2": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        "linf": torch.full((4,), 0.25, dtype=torch.float64),
        "dnn_before": torch.tensor([0, 0, 1, 1]),
        "dnn_after": torch.tensor([1, 1, 1, 0]),
        "knn_before": torch.tensor([0, 0, 1, 0]),
        "knn_after": torch.tensor([0, 0, 0, 0]),
        "dknn_before": torch.tensor([0, 0, 1, 1]),
        "dknn_after": torch.tensor([0, 0, 1, 1]),
        "surrogate_before": torch.tensor([0, 1, 0, 0]),
        "surrogate_after": torch.tensor([0, 1, 0, 0]),
        "votes_before": votes,
        "votes_after": votes,
        "knn_credibility_before": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        "knn_credibility_after": torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
        "dknn_credibility_before": torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64),
        "dknn_credibility_after": torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64),
    }


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
    assert set(knn) == set(TABLE2)


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
        assert set(record) == set(TABLE3)
    for record in transfer_records("MNIST", experiment(), "lenet5", "origin", None, rows):
        assert (record["attack"], record["eps"], record["paper"]) == ("clean", 0, None)


def test_the_papers_numbers() -> None:
    """Against cells of the paper's Tables 1 and 2, typed again."""
    assert published.clean_accuracy("SVHN", "dknn", VICTIM) == 90.35
    assert (
        published.clean_accuracy("FashionMNIST", "dknnb_cl", VICTIM)
        == published.clean_accuracy("FashionMNIST", "dknnb", VICTIM)
        == 89.23
    )
    assert published.accuracy_under_attack("SVHN", "dknn", "dknnb", "fgsm", {"eps": 0.05}, VICTIM) == 22.89
    assert (
        published.accuracy_under_attack("FashionMNIST", "knn", "origin", "bim", {"eps": 0.1}, VICTIM) == 5.82
    )
    assert published.accuracy_under_attack("MNIST", "dknn", "origin", "clean", {}, VICTIM) == 98.89
    for data, method, attack in (
        ("Digits", "origin", "bim"),
        ("MNIST", "mine", "bim"),
        ("MNIST", "origin", "cw"),
    ):
        assert published.accuracy_under_attack(data, "knn", method, attack, BIM, VICTIM) is None
    assert published.clean_accuracy("Digits", "dnn", VICTIM) is None
    assert published.accuracy_at_any_settings("MNIST", "dknn", "origin", "bim") == 16.8
    assert published.true_l2(1.4909) == pytest.approx(4.58, abs=0.005)


def test_other_settings_have_no_paper_cell() -> None:
    cell = ("MNIST", "knn", "origin", "bim")
    assert published.accuracy_under_attack(*cell, BIM, VICTIM) == 2.14
    assert published.accuracy_under_attack(*cell, BIM | {"steps": 50}, VICTIM) is None
    for change in ({"k": 5}, {"metric": "euclidean"}, {"layer": "relu1"}):
        assert published.accuracy_under_attack(*cell, BIM, VICTIM | change) is None
        assert published.clean_accuracy("MNIST", "knn", VICTIM | change) is None
        assert published.clean_accuracy("MNIST", "dnn", VICTIM | change) == 99.17


def test_the_papers_table3() -> None:
    """Against cells of the paper's Table 3, typed again."""
    fgsm = {"eps": 0.25}
    assert published.accuracy_on_transfer("MNIST", "lenet5", "dnn", "origin", "fgsm", fgsm, VICTIM) == 68.42
    assert published.accuracy_on_transfer("MNIST", "lenet5", "knn", "dknnb_cl", "fgsm", fgsm, VICTIM) == 64.97
    cell = ("MNIST", "lenet5", "dknn", "origin", "bim")
    assert published.accuracy_on_transfer(*cell, BIM, VICTIM) == 72.61
    assert published.accuracy_on_transfer(*cell, BIM | {"eps": 0.3}, VICTIM) is None
    assert published.accuracy_on_transfer(*cell, BIM, VICTIM | {"k": 5}) is None
    for place, other in ((0, "FashionMNIST"), (1, "resnet"), (3, "dknnb"), (4, "clean")):
        changed = [*cell[:place], other, *cell[place + 1 :]]
        assert published.accuracy_on_transfer(*changed, BIM, VICTIM) is None


def test_tables_are_printed_with_the_papers_beside(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    print_table1(clean_records("MNIST", experiment(), {"origin": rows}), "Table 1")
    clean = {**rows, "knn_after": rows["knn_before"]}
    records = [
        *attacked_records("MNIST", experiment(), "origin", None, clean),
        *attacked_records("MNIST", experiment(), "origin", "bim", rows),
        *attacked_records("MNIST", experiment(), "mine", "bim", rows),
    ]
    print_table2(records, "Table 2")
    print_table3(transfer_records("MNIST", experiment(), "lenet5", "origin", "bim", rows), "Table 3")
    told = " ".join(capsys.readouterr().out.split())
    assert "dnn 25.00 (99.17)" in told
    assert "knn origin 75.00 (98.98) 50.00 (2.14) L2 2.50 cred. 0.25" in told
    assert "knn mine - 50.00 L2 2.50 cred. 0.25" in told
    assert "lenet5 bim origin 25.00 (47.46) 50.00 (59.72) 100.00 (72.61)" in told


def test_csv_reads_back(tmp_path: Path) -> None:
    assert read_csv(tmp_path / "none.csv") == []
    write_csv(tmp_path / "t.csv", ("a", "b"), [{"a": 1, "b": None}, {"a": "x,y", "b": 2.5}])
    assert read_csv(tmp_path / "t.csv") == [{"a": "1", "b": None}, {"a": "x,y", "b": "2.5"}]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]  # and no temporary file


def test_rows_as_csv(rows: Rows, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", rows, ("relu3", "logits"), {"method": "origin", "attack": "bim"})
    lines = read_csv(tmp_path / "rows.csv")
    assert len(lines) == 4
    last = lines[3]
    assert (last["method"], last["attack"]) == ("origin", "bim")
    assert (last["id"], last["label"], last["knn_after"], last["l2"]) == ("3", "1", "0", "4.0")
    assert (last["votes_after_relu3"], last["votes_after_logits"]) == ("3 0", "2 1")
