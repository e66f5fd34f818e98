"""Samples of a split have its class shares, whatever their size."""

from fractions import Fraction

import pytest
import torch

from lightning_advknn.data.sample import fair_order

MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
COUNTS = {
    "sorted by class, as in a folder": [12, 12, 12, 12],
    "MNIST's test images without 75 a class": [count - 75 for count in MNIST_TEST],
    "long tail": [300, 90, 25, 8, 2, 1],
    "a class with no image": [5, 0, 7],
    "one class": [9],
}


def fairly_shared(counts: list[int], seats: list[int]) -> bool:
    """Whether seats follow Webster's method with at least one a class: no seat fits another class better."""
    gains = [
        Fraction(count, 2 * own + 1)
        for count, own in zip(counts, seats, strict=True)
        if count and own < count
    ]
    losses = [Fraction(count, 2 * own - 1) for count, own in zip(counts, seats, strict=True) if own > 1]
    return max(gains, default=0) <= min(losses, default=Fraction(10**9))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_beginning_has_classes_as_in_the_whole(counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = fair_order(labels, seed=3)
    assert order.sort().values.tolist() == list(range(len(labels)))
    lengths = sorted({*range(1, min(60, len(labels))), 200, 1000, len(labels) - 1, len(labels)})
    for n in (n for n in lengths if n <= len(labels)):
        found = labels[order[:n]].bincount(minlength=len(counts)).tolist()
        if n < sum(count > 0 for count in counts):
            assert max(found) == 1
        else:
            assert all(own for own, count in zip(found, counts, strict=True) if count)
            assert fairly_shared(counts, found)


def test_a_sample_is_within_one_image_of_its_share_on_mnist() -> None:
    counts = torch.tensor(COUNTS["MNIST's test images without 75 a class"])
    labels = torch.repeat_interleave(torch.arange(10), counts)[torch.randperm(int(counts.sum()))]
    order = fair_order(labels, seed=0)
    for n in range(10, len(labels), 7):
        share = counts * n / len(labels)
        assert (labels[order[:n]].bincount(minlength=10) - share).abs().max() < 1


def test_the_order_is_of_the_seed_and_draws_from_everywhere() -> None:
    labels = torch.arange(4).repeat_interleave(500)
    state = torch.random.get_rng_state()
    orders = [fair_order(labels, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    # For a tenth of each class, the mean position is 249.5, with standard error 19.4.
    places = orders[0][:200].sort().values.view(4, 50) % 500
    assert ((places.double().mean(1) - 249.5).abs() < 4 * 19.4).all()
