"""The parts of a descent on functions whose minima are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Adam

from lightning_advknn.attacks.parts.descent import (
    Best,
    Bisection,
    Box,
    descend,
    last_success,
    squared_l2,
)


def column(*values, device="cpu"):
    return torch.tensor(values, device=device).view(-1, 1, 1, 1)


def test_a_box_gives_back_its_images(device):
    images = column(0.0, 0.2, 0.5, 0.9, 1.0, device=device)
    box = Box((images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1))
    variables = box.variables(images)
    assert variables.requires_grad
    # Those on the edge start 1e-4 of the radius .05 inside.
    assert box.stored(variables).flatten().tolist() == pytest.approx(
        [5e-6, 0.2, 0.5, 0.9, 1 - 5e-6], abs=1e-7
    )
    assert (box.images(variables) - images).abs().max() < 5.1e-6
    far = torch.full_like(variables, 50)
    assert torch.equal(box.stored(far), box.highest)
    assert torch.equal(box.stored(-far), box.lowest)


def test_a_box_of_no_width_holds_its_images(device):
    images = column(0.0, 0.3, 1.0, device=device)
    box = Box(images, images)
    assert torch.equal(box.stored(box.variables(images)), images)


def test_pixels_move_off_the_edge(device):
    images = column(0.0, 1.0, device=device)
    box = Box(torch.zeros_like(images), torch.ones_like(images))
    variables = box.variables(images)
    optimizer = Adam([variables], lr=0.1)
    for _ in descend(lambda w: (box.images(w) - 0.3).square().flatten(), variables, optimizer, 300, 300):
        pass
    assert box.stored(variables).flatten().tolist() == pytest.approx([0.3, 0.3], abs=1e-3)


def test_pauses(device):
    variables = torch.zeros(2, device=device).requires_grad_()
    optimizer = Adam([variables], lr=1.0)
    # Adam's first step is of length lr.
    seen = [
        variables.detach().tolist()
        for _ in descend(lambda w: w * torch.tensor([1, -1]).to(w), variables, optimizer, 1, 5)
    ]
    assert seen == [[pytest.approx(-1), pytest.approx(1)]]
    for steps, every, pauses in ((0, 3, 0), (2, 3, 1), (6, 3, 2), (7, 3, 3)):
        assert len(list(descend(lambda w: w**2, variables, optimizer, steps, every))) == pauses
    assert not torch.isnan(variables).any()


def test_what_is_kept():
    images = column(0.0, 0.0, 0.0, 0.0)
    # What the four images are tried with, and whether that fools.
    tries = [
        ([0.5, 0.5, 0.5, 0.5], [False, True, False, False]),
        ([0.9, 0.9, 0.9, 0.9], [True, True, False, True]),
        ([0.2, 0.2, 0.2, 0.2], [True, False, False, False]),
    ]
    for smallest, expected in ((False, [0.2, 0.9, 0.2, 0.9]), (True, [0.2, 0.5, 0.2, 0.9])):
        best = Best(images, smallest)
        assert torch.equal(best.adversarial, images)
        for adversarial, fooled in tries:
            best.offer(column(*adversarial), torch.tensor(fooled))
        assert best.adversarial.flatten().tolist() == pytest.approx(expected)
    assert (images == 0).all()


def test_weights_are_bisected():
    # Thresholds .3 and 50: 1 is enough for the first, then halves; the second needs 10 and 100 first.
    search, thresholds = Bisection(torch.ones(2)), torch.tensor([0.3, 50.0])
    seen = []
    for _ in range(5):
        seen.append(search.weights.tolist())
        search.narrow(search.weights >= thresholds)
    assert seen == [[1, 1], [0.5, 10], [0.25, 100], [0.375, 55], [0.3125, 32.5]]


def test_the_last_success_is_returned():
    # The victim takes .5 to .7 for another class; the descent to 1 passes through there, and the last check
    # there counts.
    asked = []

    def victim(images):
        asked.append(images.flatten().tolist())
        return ((images > 0.5) & (images < 0.7)).flatten().long()

    images, labels = column(0.2, 0.95), torch.zeros(2).long()
    box = Box(torch.zeros_like(images), torch.ones_like(images))
    settings = {"steps": 200, "lr": 0.02, "check_every": 5}
    found = last_success(
        SimpleNamespace(predict=victim), images, labels, lambda x: -x.flatten(), box, **settings
    )
    assert len(asked) == 40
    first = [pixels[0] for pixels in asked if 0.5 < pixels[0] < 0.7]
    assert len(first) > 1
    assert found.flatten().tolist() == [first[-1], asked[-1][1]]
    assert asked[-1][0] > 0.9
    # Within .1 of the images there is nothing to find: the last iterate, at the ball's edge.
    found = last_success(
        SimpleNamespace(predict=victim), images, labels, lambda x: -x.flatten(), box, **settings, radius=0.02
    )
    assert found.flatten().tolist() == pytest.approx([0.22, 0.97], abs=1e-6)


def test_an_infinite_ball_is_none():
    images = column(0.2)
    box = Box(torch.zeros_like(images), torch.ones_like(images))
    found = last_success(
        SimpleNamespace(predict=lambda x: x.flatten().long()),
        images,
        torch.zeros(1).long(),
        lambda x: -x.flatten(),
        box,
        steps=300,
        lr=0.1,
        check_every=100,
        radius=math.inf,
    )
    assert found.item() > 0.9


def test_squared_l2_by_hand():
    images = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.2, 0.2]])
    adversarial = torch.tensor([[0.5, 0.9], [0.3, 0.4], [0.2, 0.2]])
    torch.testing.assert_close(squared_l2(images, adversarial), torch.tensor([0.16, 0.25, 0.0]))
