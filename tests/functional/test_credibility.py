"""Credibility (Eq. 4-6) against a table worked by hand and loops over exact fractions."""

from fractions import Fraction

import pytest
import torch

from lightning_advknn.functional import credibility, dknn_prediction, true_class_votes

# C = 3 classes, L = 2 layers, k = 4 neighbours, so kL = 8.
#
# Calibration   layer 1    layer 2    label   true-class votes   sum a_n   nonconformity 8 - a_n
CALIBRATION = [
    ([4, 0, 0], [4, 0, 0], 0),  #       0     (4, 4)             8         0
    ([1, 3, 0], [0, 3, 1], 1),  #       1     (3, 3)             6         2
    ([0, 2, 2], [1, 1, 2], 2),  #       2     (2, 2)             4         4
    ([2, 1, 1], [3, 0, 1], 1),  #       1     (1, 0)             1         7
    ([0, 4, 0], [0, 4, 0], 1),  #       1     (4, 4)             8         0
]
# Query        layer 1    layer 2     sums        Eq. 4   v    strict a<v   ge a<=v    trim_zeros: of 6, 4, 1
QUERIES = [
    ([3, 1, 0], [1, 3, 0]),  #        (4, 4, 0)   0       4    {1}          {4, 1}     {4, 1}
    ([0, 0, 4], [0, 0, 4]),  #        (0, 0, 8)   2       8    {6, 4, 1}    all five   all three
    ([2, 1, 1], [1, 1, 2]),  #        (3, 2, 3)   0       3    {1}          {1}        {1}
    ([0, 4, 0], [2, 2, 0]),  #        (2, 6, 0)   1       6    {4, 1}       {6, 4, 1}  all three
]
EXPECTED = {
    "strict": [1 / 5, 3 / 5, 1 / 5, 2 / 5],
    "ge": [2 / 5, 1, 1 / 5, 3 / 5],
    "trim_zeros": [2 / 3, 1, 1 / 3, 1],
}


def hand_calibration(device) -> torch.Tensor:
    votes = torch.tensor([[first, second] for first, second, _ in CALIBRATION], device=device)
    labels = torch.tensor([label for _, _, label in CALIBRATION], device=device)
    return true_class_votes(votes, labels)


def random_votes(generator: torch.Generator, samples: int, layers: int, classes: int, k: int) -> torch.Tensor:
    # A biased draw: some samples are unanimous (nonconformity 0).
    favourite = torch.randint(classes, (samples, 1, 1), generator=generator)
    labels = torch.randint(classes, (samples, layers, k), generator=generator)
    stray = (
        torch.rand(samples, layers, k, generator=generator)
        < torch.rand(samples, 1, 1, generator=generator) - 0.3
    )
    return torch.nn.functional.one_hot(torch.where(stray, labels, favourite), classes).sum(2)


def test_true_class_votes_by_hand(device):
    assert hand_calibration(device).tolist() == [[4, 4], [3, 3], [2, 2], [1, 0], [4, 4]]


@pytest.mark.parametrize("convention", ["strict", "ge", "trim_zeros"])
def test_credibility_by_hand(device, convention):
    votes = torch.tensor(QUERIES, device=device)
    assert dknn_prediction(votes).tolist() == [0, 2, 0, 1]
    result = credibility(votes, hand_calibration(device).sum(1), convention)
    assert result.dtype == torch.float64
    torch.testing.assert_close(
        result.cpu(), torch.tensor(EXPECTED[convention], dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_the_default_is_eq_5_as_printed(device):
    votes, calibration = torch.tensor(QUERIES, device=device), hand_calibration(device).sum(1)
    assert torch.equal(credibility(votes, calibration), credibility(votes, calibration, "strict"))


@pytest.mark.parametrize("convention", ["strict", "ge", "trim_zeros"])
@pytest.mark.parametrize(("layers", "classes", "k"), [(1, 2, 1), (2, 3, 4), (4, 10, 75), (3, 5, 2)])
def test_credibility_agrees_with_a_loop_over_nonconformities(device, convention, layers, classes, k):
    generator = torch.Generator().manual_seed(layers * 1000 + k)
    calibration = random_votes(generator, 60, layers, classes, k)
    labels = torch.randint(classes, (60,), generator=generator)
    queries = random_votes(generator, 50, layers, classes, k)
    # The DkNN paper's nonconformity of a sample for a class: neighbours over all layers of another class.
    scores = [
        sum(sum(layer) - layer[label] for layer in sample)
        for sample, label in zip(calibration.tolist(), labels.tolist(), strict=True)
    ]
    if convention == "trim_zeros":
        scores = [score for score in scores if score > 0]
    expected = []
    for sample in queries.tolist():
        p = []
        for label in range(classes):
            nonconformity = sum(sum(layer) - layer[label] for layer in sample)
            if convention == "strict":
                p.append(Fraction(sum(score > nonconformity for score in scores), len(scores)))
            else:
                p.append(Fraction(sum(score >= nonconformity for score in scores), len(scores)))
        # Credibility is the largest p-value; Eq. (4)'s class has it.
        expected.append(float(max(p)))
    result = credibility(
        queries.to(device), true_class_votes(calibration, labels).sum(1).to(device), convention
    )
    torch.testing.assert_close(result.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_conventions_order_on_every_sample(device):
    generator = torch.Generator().manual_seed(0)
    votes = random_votes(generator, 100, 4, 10, 5).to(device)
    calibration = random_votes(generator, 80, 4, 10, 5)[..., 0].sum(1).to(device)
    strict, ge = credibility(votes, calibration, "strict"), credibility(votes, calibration, "ge")
    assert (strict <= ge).all()
    assert (strict < ge).any()
    assert (credibility(votes, calibration, "trim_zeros") != ge).any()


def test_no_queries_no_credibilities(device):
    votes = torch.zeros(0, 2, 3, dtype=torch.int64, device=device)
    assert credibility(votes, hand_calibration(device).sum(1), "trim_zeros").shape == (0,)


def test_unknown_convention_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'ge', 'strict', 'trim_zeros'.*'gt'"):
        credibility(torch.tensor(QUERIES), torch.tensor([1]), "gt")


@pytest.mark.parametrize(
    ("calibration", "convention"),
    [([], "strict"), ([], "ge"), ([], "trim_zeros"), ([8, 8], "trim_zeros")],
)
def test_empty_calibration_set_is_an_error(calibration, convention):
    with pytest.raises(ValueError, match=r"Expected at least one calibration sample.*larger calibration set"):
        credibility(torch.tensor(QUERIES), torch.tensor(calibration, dtype=torch.int64), convention)
