"""The minimum-norm attack where the smallest perturbation is known."""

import math

import numpy as np
import pytest
import torch

from lightning_advknn.attacks import sitawarin_wagner_minimum_norm
from lightning_advknn.attacks.parts.guide_distances import Guides
from lightning_advknn.attacks.sitawarin_wagner_2020 import _hinge_loss

# The rows of `hand_dknn` in conftest.
ROWS = np.array([(0, 0), (0.1, 0), (0.2, 1), (1, 0), (0.9, 1), (1, 1)])


def points(*rows, device):
    return torch.tensor(rows, device=device)[:, None, None]


def test_the_loss_is_the_double_loop(hand_dknn, device):
    images = [(0.05, 0.1), (0.7, 0.6), (0.9, 0.3)]
    # Two guides of a wrong class, then two of the own one; the last image counts one of either.
    rows, radii, halves = (
        [(2, 3, 0, 1), (4, 5, 2, 3), (5, 4, 3, 2)],
        [(1.0, 0.7), (0.6, 0.5), (0.9, 0.2)],
        [2, 2, 1],
    )
    guides = Guides(hand_dknn, torch.tensor(rows, device=device))
    with torch.no_grad():
        distances = guides.squared_distances(points(*images, device=device))
    found = _hinge_loss(distances, torch.tensor(radii, device=device), torch.tensor(halves, device=device))
    for image, point in enumerate(images):
        expected = 0.0
        for place, row in enumerate(rows[image]):
            if place % 2 < halves[image]:
                sign = 1 if place < 2 else -1
                lengths = math.dist(point, ROWS[row]), abs(point[1] - ROWS[row][1])
                for eta, length in zip(radii[image], lengths, strict=True):
                    expected += max(0, sign * (length**2 - eta**2) + 1e-5)
        assert expected > 0
        assert found[image].item() == pytest.approx(expected, rel=1e-4)


def test_the_first_step_descends_the_double_loop(hand_dknn, device):
    # RMSprop's first step is of length 10 lr in each variable that has a gradient, against its sign.
    images, labels = [(0.05, 0.1), (0.7, 0.6), (0.3, 0.2)], [0, 2, 0]
    wrong, own = [(2, 3)] * 3, [(0, 1), (4, 5), (0, 1)]  # by mean distance in the first layer

    def loss(point, image, radii):
        total = 0.0
        for sign, rows in ((1, wrong[image]), (-1, own[image])):
            for row in rows:
                total += max(0, sign * (math.dist(point, ROWS[row]) ** 2 - radii[0] ** 2) + 1e-5)
                total += max(0, sign * ((point[1] - ROWS[row][1]) ** 2 - radii[1] ** 2) + 1e-5)
        return total

    settings = {"m": 4, "search_steps": 1, "steps": 1, "lr": 0.001}
    images_in, labels_in = points(*images, device=device), torch.tensor(labels, device=device)
    found = sitawarin_wagner_minimum_norm(hand_dknn, images_in, labels_in, **settings).flatten(1).tolist()
    signs = set()
    for image, point in enumerate(images):
        third = (
            sorted(math.dist(point, row) for row in ROWS)[2],
            sorted(abs(point[1] - row[1]) for row in ROWS)[2],
        )
        for axis in (0, 1):
            step = np.eye(2)[axis] * 1e-6
            slope = round(loss(point + step, image, third) - loss(point - step, image, third), 12)
            variable = math.atanh(2 * point[axis] - 1) - 0.01 * np.sign(slope)
            assert found[image][axis] == pytest.approx(0.5 + 0.5 * math.tanh(variable), abs=2e-6)
            signs.add(np.sign(slope))
    assert {-1, 1} <= signs


def test_a_bisector_is_reached_and_not_undercut(plane_knn, device):
    # The boundary between (.2, .2) and (.8, .6) is normal to (.6, .4), through (.5, .4).
    victim = plane_knn([(0.2, 0.2, 0), (0.8, 0.6, 1)], 1)
    normal = np.array([0.6, 0.4]) / math.hypot(0.6, 0.4)
    images = [(0.2, 0.2), (0.3, 0.5), (0.35, 0.25), (0.9, 0.4), (0.7, 0.8)]
    labels = torch.tensor([0, 0, 0, 1, 1], device=device)
    shortest = [abs((np.array(point) - [0.5, 0.4]) @ normal) for point in images]
    images = points(*images, device=device)
    settings = {"m": 2, "search_steps": 10, "lr": 0.02, "steps": 120, "refresh_every": 15}
    adversarial = sitawarin_wagner_minimum_norm(victim, images, labels, **settings)
    assert (victim.predict(adversarial) != labels).all()
    for found, least in zip((adversarial - images).flatten(1).norm(dim=1).tolist(), shortest, strict=True):
        assert least * (1 - 1e-5) <= found <= 1.05 * least


def test_no_grid_point_nearer_than_the_attack_by_much_fools_dknn(hand_dknn, device):
    # All images of two pixels, .01 apart: the nearest that fools is the smallest perturbation, but for a
    # cell's diagonal.
    ticks = torch.linspace(0, 1, 101, device=device)
    grid = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        classes = hand_dknn.predict(grid[:, None, None])
    images = points((0.05, 0.1), (0.95, 0.9), (0.3, 0.2), (0.8, 0.95), device=device)
    with torch.no_grad():
        labels = hand_dknn.predict(images)
    settings = {"m": 4, "search_steps": 5, "lr": 0.02, "steps": 80, "refresh_every": 10}
    adversarial = sitawarin_wagner_minimum_norm(hand_dknn, images, labels, **settings)
    assert (hand_dknn.predict(adversarial) != labels).all()
    for image, label, found in zip(images.flatten(1), labels, adversarial.flatten(1), strict=True):
        least = (grid[classes != label] - image).norm(dim=1).min().item()
        assert least - 0.008 <= (found - image).norm().item() <= 1.3 * least


def test_an_image_that_fools_as_it_is_stays(hand_dknn, device):
    images = points((0.05, 0.1), (0.95, 0.9), device=device)
    settings = {"m": 4, "search_steps": 2, "lr": 0.02, "steps": 40, "refresh_every": 20}
    adversarial = sitawarin_wagner_minimum_norm(
        hand_dknn, images, torch.tensor([1, 2], device=device), **settings
    )
    assert torch.equal(adversarial[0], images[0])
    assert not torch.equal(adversarial[1], images[1])


def test_guides_shrink_to_a_majority_after_success(plane_knn, device, monkeypatch):
    # k = 5: from six guides of either class half of the way to three, each time that the victim is fooled.
    rows = [(0.1 + 0.01 * i, 0.5, 0) for i in range(6)] + [(0.9 - 0.01 * i, 0.5, 1) for i in range(6)]
    victim = plane_knn(rows, 5)
    halves = []

    def spy(distances, radii, counted):
        halves.append(counted.tolist())
        return _hinge_loss(distances, radii, counted)

    monkeypatch.setattr("lightning_advknn.attacks.sitawarin_wagner_2020._hinge_loss", spy)
    images, labels = points((0.2, 0.5), device=device), torch.zeros(1, device=device).long()
    settings = {"m": 12, "weight": 100.0, "lr": 0.05, "steps": 40, "refresh_every": 20, "search_steps": 4}
    adversarial = sitawarin_wagner_minimum_norm(victim, images, labels, **settings)
    assert victim.predict(adversarial).item() == 1
    assert [halves[40 * step][0] for step in range(4)] == [6, 4, 3, 3]
    assert len(halves) == 160
