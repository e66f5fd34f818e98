"""Votes and predictions against loops in plain Python and exact fractions."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from lightning_advknn import functional


def random_votes(seed: int, samples: int, layers: int, classes: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    neighbours = torch.randint(classes, (samples * layers, k), generator=generator)
    rows = [[row.count(label) for label in range(classes)] for row in neighbours.tolist()]
    return torch.tensor(rows).reshape(samples, layers, classes)


@pytest.mark.parametrize(
    ("neighbour_labels", "votes"),
    [
        ([[0, 0, 0]], [[3, 0, 0]]),
        ([[2, 0, 2], [1, 2, 0]], [[1, 0, 2], [1, 1, 1]]),
        ([[2]], [[0, 0, 1]]),
    ],
)
def test_count_votes_by_hand(device, neighbour_labels, votes):
    counted = functional.count_votes(torch.tensor(neighbour_labels, device=device), 3)
    assert counted.dtype == torch.int64
    assert counted.tolist() == votes


@pytest.mark.parametrize(("k", "classes"), [(1, 2), (5, 3), (75, 10), (200, 10)])
def test_count_votes_agrees_with_counter(device, k, classes):
    labels = torch.randint(classes, (40, k), generator=torch.Generator().manual_seed(k))
    votes = functional.count_votes(labels.to(device), classes)
    expected = [[Counter(row)[label] for label in range(classes)] for row in labels.tolist()]
    assert votes.tolist() == expected
    assert votes.sum(1).tolist() == [k] * 40


def test_count_votes_of_no_images(device):
    votes = functional.count_votes(torch.empty(0, 4, dtype=torch.int64, device=device), 3)
    assert votes.shape == (0, 3)


def test_count_votes_refuses_a_label_outside_the_classes():
    with pytest.raises(RuntimeError, match="out of bounds"):
        functional.count_votes(torch.tensor([[0, 3]]), 3)


def test_vote_distribution_is_counts_over_k(device):
    votes = random_votes(0, 20, 3, 10, 75)
    distribution = functional.vote_distribution(votes.to(device))
    assert distribution.dtype == torch.float32
    expected = [[[float(Fraction(v, 75)) for v in layer] for layer in sample] for sample in votes.tolist()]
    torch.testing.assert_close(distribution.cpu(), torch.tensor(expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(distribution.sum(-1).cpu(), torch.ones(20, 3))


@pytest.mark.parametrize(
    ("votes", "prediction"),
    [
        ([5, 0, 0], 0),
        ([0, 0, 5], 2),
        ([1, 2, 2], 1),  # a tie goes to the lowest class
        ([2, 1, 2], 0),
        ([0, 2, 2], 1),
        ([1, 1, 1], 0),
        ([60_000, 60_001, 60_001], 1),
    ],
)
def test_knn_prediction_by_hand(device, votes, prediction):
    assert functional.knn_prediction(torch.tensor([votes], device=device)).tolist() == [prediction]


@pytest.mark.parametrize("k", [1, 2, 4, 75])
def test_knn_prediction_is_the_first_maximum(device, k):
    votes = random_votes(k, 300, 2, 10, k)
    predictions = functional.knn_prediction(votes.to(device)).tolist()
    # `list.index` finds the first, hence the lowest class among equals.
    expected = [[row.index(max(row)) for row in sample] for sample in votes.tolist()]
    assert predictions == expected
    if k <= 4:
        ties = sum(row.count(max(row)) > 1 for sample in votes.tolist() for row in sample)
        assert ties > 20 or k == 1, "the sample should hold ties"


@pytest.mark.parametrize("k", [2, 3, 75])
def test_dknn_prediction_is_eq_4_in_exact_fractions(device, k):
    votes = random_votes(k, 200, 4, 10, k)
    predictions = functional.dknn_prediction(votes.to(device)).tolist()
    for sample, predicted in zip(votes.tolist(), predictions, strict=True):
        summed = [sum(Fraction(layer[i], k) for layer in sample) for i in range(10)]
        assert predicted == max(range(10), key=lambda i: (summed[i], -i))


def test_dknn_prediction_ties_go_to_the_lowest_class_and_differ_from_each_layers_choice(device):
    # layer 1: class 2, layer 2: class 1, sums (3, 4, 4): class 1
    votes = torch.tensor(
        [[[1, 0, 4], [2, 3, 0], [0, 1, 0]], [[0, 3, 0], [3, 0, 0], [0, 0, 3]]], device=device
    )
    assert functional.dknn_prediction(votes).tolist() == [1, 0]
