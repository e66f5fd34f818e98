"""Verdicts of every victim, and the threshold of alarms, by hand."""

import pytest
import torch

from lightning_advknn.evaluation import judge_rows
from lightning_advknn.reports.leaderboards.attack_runs import alarm_threshold


def test_votes_judge_every_layer_by_hand() -> None:
    rows = {
        "label": torch.tensor([0, 0, 1]),
        "dnn_after": torch.tensor([0, 1, 1]),
        # Layers a and b of k = 4: both right; a wrong and the sum wrong; a ties (class 0 wins), the sum right.
        "votes_after": torch.tensor([[[4, 0], [3, 1]], [[0, 4], [3, 1]], [[2, 2], [0, 4]]]),
    }
    calibration = torch.tensor([[4, 4], [3, 4], [2, 1], [0, 3]])  # sums 8, 7, 3, 3
    judged = judge_rows(rows, ("a", "b"), calibration, "strict")
    assert list(judged) == ["dnn", "knn/a", "knn/b", "dknn"]
    wrong = {victim: one.wrong.tolist() for victim, one in judged.items()}
    assert wrong == {
        "dnn": [False, True, False],
        "knn/a": [False, True, True],
        "knn/b": [False, False, False],
        "dknn": [False, True, False],
    }
    assert judged["dnn"].credibility is None
    # Shares of calibration images with fewer votes than the winner: a 4, 4, 2; b 3, 3, 4; both 7, 5, 6.
    for victim, shares in {
        "knn/a": [0.75, 0.75, 0.25],
        "knn/b": [0.25, 0.25, 0.5],
        "dknn": [0.5] * 3,
    }.items():
        assert judged[victim].credibility.tolist() == shares


@pytest.mark.parametrize("n", [1, 19, 20, 39, 41, 60, 547, 9250])
def test_the_threshold_is_the_largest_with_few_false_alarms(n: int) -> None:
    credibility = torch.randint(0, 30, (n,), generator=torch.Generator().manual_seed(n)).double() / 30
    threshold = alarm_threshold(credibility)
    assert (credibility < threshold).sum() <= n / 20
    above = credibility[credibility > threshold]
    assert not len(above) or (credibility < above.min()).sum() > n / 20
