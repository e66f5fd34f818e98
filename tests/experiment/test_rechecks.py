"""What is asked once more about stored images."""

import torch

from lightning_advknn.experiment.rechecks import telling_rows


def test_telling_rows_fool_both_victims_one_a_class_first() -> None:
    rows = {
        "label": torch.tensor([0, 0, 0, 1, 1, 2]),
        "knn_before": torch.tensor([0, 0, 0, 1, 1, 0]),
        "dknn_before": torch.tensor([0, 0, 0, 1, 1, 2]),
        "knn_after": torch.tensor([1, 1, 0, 0, 0, 0]),
        "dknn_after": torch.tensor([1, 1, 1, 0, 0, 0]),
    }
    # Sample 2 fools only DkNN, sample 5 was wrong before.
    assert telling_rows(rows, 2) == [0, 3]
    assert telling_rows(rows, 4) == [0, 3, 1, 4]
    rows["knn_after"] = rows["dknn_after"] = rows["label"]
    assert len(telling_rows(rows, 3)) == 3  # nothing to tell: any will do
