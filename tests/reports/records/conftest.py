"""Per-sample rows worked by hand."""

import pytest
import torch

from lightning_advknn.evaluation import Rows


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
