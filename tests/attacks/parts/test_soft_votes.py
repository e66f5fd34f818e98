"""Soft votes against finite differences, and attacks along them against distances worked by hand."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from lightning_advknn.attacks import credible, minimum_norm
from lightning_advknn.attacks.parts.balls import heading, into_ball, length, onto_sphere
from lightning_advknn.attacks.parts.soft_votes import Neighbours, find_neighbours, vote_directions
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import BankSettings, build_banks


def pixels_knn(points, labels, k, device, metric="euclidean"):
    """A kNN on pixels: points (x, y) as 1x1x2 images."""
    network = nn.Sequential(OrderedDict(flatten=nn.Flatten(), pixels=nn.Linear(2, 2), logits=nn.Linear(2, 2)))
    state = {"pixels.weight": torch.eye(2), "pixels.bias": torch.zeros(2)}
    network.load_state_dict(state, strict=False)
    features = FeatureNetwork(network, ["pixels"]).eval().to(device)
    batch = Batch(points[:, None, None], labels, torch.arange(len(points)))
    return DkNN.on_banks(features, build_banks(features, [batch], 2, BankSettings(metric)), k).to(device)


def two_columns(device, k=1):
    """Class 0 along x = .2, class 1 along x = .8: the boundary is x = .5."""
    heights = torch.linspace(0, 1, 21)
    points = torch.cat([torch.stack([torch.full_like(heights, x), heights], 1) for x in (0.2, 0.8)])
    return pixels_knn(points, torch.arange(42) // 21, k, device)


def rightward(images):
    """A surrogate that is roughly right: class 1 to the right of x + .2 y = .6."""
    x, y = images.flatten(1).unbind(1)
    margin = 10 * (x + 0.2 * y - 0.6)
    return torch.stack([-margin, margin], 1)


def queries(device):
    points = torch.tensor([[0.1, 0.5], [0.25, 0.1], [0.4, 0.9], [0.9, 0.5], [0.6, 0.3]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    return points[:, None, None].to(device), labels.to(device), (points[:, 0] - 0.5).abs()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("against", [True, False])
def test_directions_are_gradients_of_soft_votes(device, metric, against):
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.rand(40, 2, generator=generator), torch.randint(2, (40,), generator=generator)
    knn = pixels_knn(points, labels, 5, device, metric)
    images = torch.rand(6, 1, 1, 2, generator=generator).to(device)
    targets = torch.tensor([0, 1, 0, 1, 0, 1], device=device)
    found = find_neighbours(knn, images, 40)
    directions = vote_directions(knn, found, targets, 1 - targets if against else None, 0.25)

    def soft_votes(query, similar, target, total, width):
        """Votes of the target less the others', with eta such that they sum to what they did: by bisection."""
        low, high = similar.min() - 9, similar.max() + 9
        for _ in range(100):
            eta = (low + high) / 2
            soft = 1 / (1 + np.exp(-(similar - eta) / width))
            low, high = (eta, high) if soft.sum() > total else (low, eta)
        return (soft * np.where(query == target, 1, -1)).sum()

    def similarities(x):
        rows = points.double().numpy()
        if metric == "euclidean":
            return -((x - rows) ** 2).sum(1)
        return rows @ x / np.linalg.norm(rows, axis=1)  # x is a unit vector, or nearly

    for image, target, direction in zip(
        images.cpu(), targets.tolist(), directions["pixels"].cpu(), strict=True
    ):
        x = image.flatten().double().numpy()
        x = x / np.linalg.norm(x) if metric == "cosine" else x
        here = similarities(x)
        nearest = np.sort(here)[::-1]
        eta, width = (nearest[4] + nearest[5]) / 2, 0.25 * (nearest[2] - nearest[-1])
        total = (1 / (1 + np.exp(-(here - eta) / width))).sum()
        slopes = []
        for step in np.eye(2) * 1e-5:
            up, down = (
                soft_votes(labels.numpy(), similarities(x + sign * step), target, total, width)
                for sign in (1, -1)
            )
            slopes.append((up - down) / 2e-5)
        # Of minus the squared distance the code leaves out the factor 2, and where all others are
        # against, a vote lost is a vote won.
        ours = direction.double().numpy() * (2 if metric == "euclidean" else 1)
        cosine = ours @ slopes / np.linalg.norm(ours) / np.linalg.norm(slopes)
        assert cosine == pytest.approx(1, abs=2e-2 if metric == "cosine" else 1e-4)


def test_neighbours_by_hand(hand_dknn):
    images = torch.tensor([[0.0, 0.1], [1.0, 0.9]], device=hand_dknn.calibration_votes.device)[:, None, None]
    found = find_neighbours(hand_dknn, images, 4)
    # As in test_evaluation.py; the fourth of both layers: (.2, 1) and (1, 0); on height, rows tie by bank
    # row.
    assert found.votes.tolist() == [[[2, 1, 0], [2, 1, 0]], [[0, 1, 2], [0, 1, 2]]]
    assert found.rows["both"][0].tolist() == [0, 1, 2, 3]
    assert found.wide_votes[0, 0].tolist() == [2, 2, 0]
    labels = torch.tensor([0, 0], device=images.device)
    assert found.fooled(labels).tolist() == [False, True]
    assert found.runner_up(labels).tolist() == [1, 2]
    assert hand_dknn.queries == 2


def test_a_wider_circle_tells_classes_without_votes_apart():
    votes, wide = torch.tensor([[[3, 0, 0]]]), torch.tensor([[[3, 1, 2]]])
    assert Neighbours({}, {}, votes, wide).runner_up(torch.tensor([0])).tolist() == [2]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("k", [1, 3])
def test_minimum_norm_comes_to_the_boundary(device, norm, k):
    victim = two_columns(device, k)
    images, labels, distances = queries(device)
    adversarial = minimum_norm(
        victim, images, labels, surrogate=rightward, norm=norm, neighbours=42, steps=60, temperature=0.1
    )
    found = length(adversarial - images, norm).cpu()
    assert (victim.predict(adversarial) != labels).all()
    # The nearest other side is straight across, in either norm.
    assert (found >= distances - 1e-6).all()
    torch.testing.assert_close(found, distances, rtol=0.05, atol=2e-3)


def test_minimum_norm_leaves_what_is_wrong_already(device):
    victim = two_columns(device)
    images, labels, _ = queries(device)
    adversarial = minimum_norm(victim, images, 1 - labels, surrogate=rightward, neighbours=42, steps=5)
    assert torch.equal(adversarial, images)


def away(images):
    return -rightward(images)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_minimum_norm_goes_towards_other_images_where_surrogate_and_votes_lead_nowhere(device, norm):
    victim = two_columns(device)
    images, labels, distances = queries(device)
    settings = {"surrogate": away, "norm": norm, "neighbours": 42, "surrogate_steps": 3, "steps": 0}
    assert set(labels.tolist()) == {0, 1}
    together = minimum_norm(victim, images, labels, **settings)
    assert (victim.predict(together) != labels).all()
    # Half way at most to the nearest image of the other class, and to the sixth halving's precision.
    other = labels != labels[:, None]
    apart = torch.cdist(images.flatten(1), images.flatten(1), p=2 if norm == "l2" else torch.inf)
    assert (length(together - images, norm) <= apart.masked_fill(~other, torch.inf).amin(1) + 1e-6).all()
    assert (length(together - images, norm).cpu() >= distances - 1e-6).all()
    one = labels == labels[0]
    alone = minimum_norm(victim, images[one], labels[one], **settings)
    assert (victim.predict(alone) == labels[one]).all()


def test_minimum_norm_gives_the_farthest_where_nothing_fools(device):
    points = torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    victim = pixels_knn(points, torch.zeros(10).long(), 1, device)
    images, _, _ = queries(device)
    labels = torch.zeros(5, device=device).long()
    adversarial = minimum_norm(victim, images, labels, surrogate=rightward, neighbours=10, steps=5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_credible_errors_stay_in_the_ball_and_fool_whom_it_lets_them(device, norm):
    victim = two_columns(device, 3)
    images, labels, distances = queries(device)
    adversarial = credible(victim, images, labels, surrogate=rightward, eps=0.27, norm=norm, neighbours=42)
    assert (length(adversarial - images, norm) <= 0.27 + 1e-6).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert ((victim.predict(adversarial) != labels).cpu() == (distances < 0.27)).all()


def test_credible_errors_get_the_most_votes(device):
    # Between x = .5 and .55 the second class has two of three votes, from there on all three: (.4, .5) is of
    # the first.
    points = torch.tensor([[0.0, 0.5], [0.2, 0.5], [0.7, 0.5], [0.8, 0.5], [0.9, 0.5], [0.4, 0.5]])
    victim = pixels_knn(points, torch.tensor([0, 0, 1, 1, 1, 0]), 3, device)
    image, label = torch.tensor([[[[0.3, 0.5]]]], device=device), torch.tensor([0], device=device)
    features = victim.network.features
    nearest = minimum_norm(victim, image, label, surrogate=rightward, neighbours=6)
    most = credible(victim, image, label, surrogate=rightward, eps=0.45, neighbours=6)
    assert victim.votes(features(nearest))[0, 0].tolist() == [1, 2]
    assert victim.votes(features(most))[0, 0].tolist() == [0, 3]


@pytest.mark.parametrize("attack", [credible, minimum_norm])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"neighbours": 1}, r"in \[2, 42\], above `k`, but got 1"),
        ({"neighbours": 43}, r"in \[2, 42\], above `k`, but got 43"),
        ({"temperature": 0.0}, r"`temperature` to be above 0"),
        ({"norm": "l1"}, r"one of \('l2', 'linf'\), but got 'l1'"),
        ({"steps": 1.5}, r"`steps` to be a whole number"),
    ],
)
def test_bad_settings(device, attack, wrong, message):
    images, labels, _ = queries(device)
    settings = {"surrogate": rightward, "neighbours": 42} | ({"eps": 0.1} if attack is credible else {})
    with pytest.raises(ValueError, match=message):
        attack(two_columns(device), images, labels, **settings | wrong)


def test_at_least_one_class_is_tried(device):
    images, labels, _ = queries(device)
    with pytest.raises(ValueError, match=r"`classes` to be at least 1, but got 0"):
        minimum_norm(two_columns(device), images, labels, surrogate=rightward, neighbours=42, classes=0)


@pytest.mark.parametrize("attack", [credible, minimum_norm])
def test_no_images_and_no_gradients_outside(device, attack):
    victim = two_columns(device)
    images, labels, _ = queries(device)
    settings = {"surrogate": rightward, "neighbours": 42, "steps": 3} | (
        {"eps": 0.1} if attack is credible else {}
    )
    assert attack(victim, images[:0], labels[:0], **settings).shape == (0, 1, 1, 2)
    with torch.inference_mode():
        adversarial = attack(victim, images, labels, **settings)
    assert adversarial.shape == images.shape
    assert not any(parameter.grad is not None for parameter in victim.parameters())


def test_balls_by_hand():
    perturbation, radius = torch.tensor([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]]), torch.tensor([1.0, 1.0, 1.0])
    assert length(perturbation, "l2").tolist() == pytest.approx([5, 0.5, 0])
    assert length(perturbation, "linf").tolist() == pytest.approx([4, 0.4, 0])
    for function, norm, expected in (
        (into_ball, "l2", [[0.6, -0.8], [0.3, 0.4], [0, 0]]),
        (into_ball, "linf", [[1, -1], [0.3, 0.4], [0, 0]]),
        (onto_sphere, "l2", [[0.6, -0.8], [0.6, 0.8], [0, 0]]),
        (onto_sphere, "linf", [[1, -1], [0.3, 0.4], [0, 0]]),
    ):
        torch.testing.assert_close(function(perturbation, radius, norm), torch.tensor(expected).float())
    torch.testing.assert_close(
        heading(perturbation, "l2"), torch.tensor([[0.6, -0.8], [0.6, 0.8], [0.0, 0.0]])
    )
    assert heading(perturbation, "linf").tolist() == [[1, -1], [1, 1], [0, 0]]
