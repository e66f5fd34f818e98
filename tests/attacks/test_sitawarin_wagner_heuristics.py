"""The heuristics of Sitawarin and Wagner on points worked by hand (`hand_dknn` and `plane_knn` in conftest)."""

import pytest
import torch

from lightning_advknn.attacks import sitawarin_wagner_baseline, sitawarin_wagner_mean
from lightning_advknn.classifiers import DkNN


def points(*rows, device):
    return torch.tensor(rows, device=device)[:, None, None]


# Means (.15, .5), (.7, .5) and (.5, 1); the middle one's rows are apart.
PLANE = [(0.1, 0.5, 0), (0.2, 0.5, 0), (0.6, 0.5, 1), (0.8, 0.5, 1), (0.5, 1.0, 2)]


def test_the_mean_heuristic_by_hand(plane_knn, device):
    # (.2, .5), class 0: towards (.7, .5), 1 nearest from .4 on, 40 % of the way; of the shares 1, .5, .25,
    # .375, .4375, .40625 the last is the smallest that fools. (.7, .5), class 1: (.5, 1) is at .54, (.15, .5)
    # at .55. From (.7 - .2 s, .5 + .5 s), (.6, .5) is nearest until (.1 - .2 s)^2 + (.5 s)^2 = (.2 - .2 s)^2
    # + (.5 - .5 s)^2, s = .28 / .54 = .519: of 1, .5, .75, .625, .5625, .53125 the last.
    victim = plane_knn(PLANE, 1)
    images = points((0.2, 0.5), (0.7, 0.5), device=device)
    labels = torch.tensor([0, 1], device=device)
    adversarial = sitawarin_wagner_mean(victim, images, labels)
    torch.testing.assert_close(
        adversarial.flatten(1).cpu(),
        torch.tensor([[0.2 + 0.5 * 0.40625, 0.5], [0.7 - 0.2 * 0.53125, 0.5 + 0.5 * 0.53125]]),
    )
    assert victim.predict(adversarial).tolist() == [1, 2]
    # Without bisection, the means themselves.
    adversarial = sitawarin_wagner_mean(victim, images, labels, search_steps=0)
    torch.testing.assert_close(adversarial.flatten(1).cpu(), torch.tensor([[0.7, 0.5], [0.5, 1.0]]))


def test_the_mean_where_nothing_fools(plane_knn, device):
    # Of all five, classes 0 and 1 tie on two votes each, and 0 wins.
    victim = plane_knn(PLANE, 5)
    images, labels = points((0.2, 0.5), device=device), torch.zeros(1, device=device).long()
    adversarial = sitawarin_wagner_mean(victim, images, labels)
    torch.testing.assert_close(adversarial.flatten().cpu(), torch.tensor([0.7, 0.5]))


def test_the_mean_heuristic_needs_pixels(hand_dknn, device):
    images, labels = points((0.1, 0.2), device=device), torch.zeros(1, device=device).long()
    for victim in (hand_dknn, hand_dknn.only("height")):
        with pytest.raises(ValueError, match=r"one layer that returns the pixels, but got layers \["):
            sitawarin_wagner_mean(victim, images, labels)
    sitawarin_wagner_mean(hand_dknn.only("both"), images, labels)


def test_the_baseline_imitates_the_nearest_image_of_another_class(hand_dknn, device):
    # From (.3, .1), class 0: (1, 0) is at .71, (.2, 1) at .91. From (.8, .6), class 2: (1, 0) is at .63, (.2,
    # 1) at .72.
    images = points((0.3, 0.1), (0.8, 0.6), device=device)
    labels = torch.tensor([0, 2], device=device)
    # All six rows vote, so nothing fools, and it ends where the descent does.
    stubborn = DkNN.on_banks(hand_dknn.network, hand_dknn.banks, k=6)
    settings = {"steps": 150, "lr": 0.2, "check_every": 150}
    found = sitawarin_wagner_baseline(stubborn, images, labels, eps=2.0, **settings)
    torch.testing.assert_close(
        found.flatten(1).cpu(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), rtol=0, atol=0.03
    )
    # Within .3: so far on the straight way.
    found = sitawarin_wagner_baseline(stubborn, images, labels, eps=0.3, **{**settings, "lr": 0.02}).flatten(
        1
    )
    for image, point, target in zip(found, images.flatten(1), [(1.0, 0.0), (1.0, 0.0)], strict=True):
        way = torch.tensor(target, device=device) - point
        torch.testing.assert_close(image, point + 0.3 * way / way.norm(), rtol=0, atol=0.01)
