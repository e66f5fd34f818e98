"""What is noted of an attack's questions, against questions of our own."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import CPU_BATCH, perturb
from lightning_advknn.experiment.iterates import Iterates

LABELS = torch.zeros(4, dtype=torch.int64)
IMAGES = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None, None]  # of one pixel


class Threshold(nn.Module):
    """Class 1 from .5 on."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        return torch.cat([torch.full_like(pixels, 0.5), pixels + 1e-6], 1)


def noted(
    ask: Callable[[Any, Tensor], object], eps: float | None = 0.2, norm: Any = "linf", images: Tensor = IMAGES
) -> SimpleNamespace:
    """What is noted of an attack that asks this and returns the images."""

    def attack(target: Any, images: Tensor, _labels: Tensor) -> Tensor:
        ask(target, images)
        return images

    target = Threshold()
    watch = Iterates(norm, eps)
    labels = torch.zeros(len(images), dtype=torch.int64)
    assert torch.equal(perturb(attack, target, images, labels, watch=watch), images)
    assert not target._forward_hooks
    columns = watch.columns(len(images))
    assert {name: (column.dtype, len(column)) for name, column in columns.items()} == dict.fromkeys(
        ("reached", "moved", "differentiated"), (torch.bool, len(images))
    )
    return SimpleNamespace(**{name: column.tolist() for name, column in columns.items()})


def test_success_on_the_way_counts_within_eps_only() -> None:
    notes = noted(lambda target, images: (target(images + 0.15), target(images)))
    # .1 + .15 and so on: the last two reach .45 and .55.
    assert notes.reached == [False, False, False, True]
    assert notes.moved == [True] * 4
    notes = noted(lambda target, images: target(images + 0.3))  # beyond eps
    assert notes.reached == [False] * 4
    assert noted(lambda target, images: target(images + 0.3), eps=None).reached == [False, True, True, True]
    assert noted(lambda target, images: target(images + 0.15), norm=None).reached == [False] * 4
    assert noted(lambda target, images: target(images + 0.7), eps=None).reached == [True, True, True, False]


def test_the_clean_image_is_no_success_and_no_move() -> None:
    images = torch.full((3, 1, 1, 1), 0.9)  # wrong as they are
    notes = noted(lambda target, images: target(images), images=images)
    assert (notes.reached, notes.moved) == ([False] * 3, [False] * 3)
    assert noted(lambda target, images: None).moved == [False] * 4


def test_an_image_beside_others_is_not_known() -> None:
    notes = noted(lambda target, images: target(images[:3] + 0.2))
    assert (notes.reached, notes.moved) == ([False] * 4, [True] * 4)


def test_gradients_are_noted() -> None:
    def ask(target: Any, images: Tensor) -> None:
        with torch.enable_grad():
            target(images.clone().requires_grad_())

    assert noted(ask).differentiated == [True] * 4
    assert noted(lambda target, images: target(images)).differentiated == [False] * 4


def test_images_written_into_do_not_hide_a_move() -> None:
    def ask(target: Any, images: Tensor) -> None:
        kept = images.clone()
        target(images.add_(0.15))
        images.copy_(kept)

    notes = noted(ask)
    assert notes.reached == [False, False, False, True]


def test_rows_are_those_of_the_images_over_batches() -> None:
    n = CPU_BATCH + 3
    images = torch.linspace(0, 0.4, n)[:, None, None, None]
    notes = noted(lambda target, images: target(images + 0.15), images=images)
    assert notes.reached == (images.flatten() + 0.15 + 1e-6 > 0.5).tolist()


def test_an_attack_that_raises_leaves_no_hook() -> None:
    def attack(*_: object) -> Tensor:
        raise ValueError("no")

    target = Threshold()
    with pytest.raises(ValueError, match="no"):
        perturb(attack, target, IMAGES, LABELS, watch=Iterates("linf", 0.1))
    assert not target._forward_hooks


def test_a_victim_says_classes(hand_dknn: DkNN, device: torch.device) -> None:
    images = torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=device)[:, None, None]
    classes = hand_dknn.predict(images)

    def attack(victim: DkNN, images: Tensor, _labels: Tensor) -> Tensor:
        victim(images.flip(0))
        return images

    watch = Iterates("l2", None)
    perturb(attack, hand_dknn, images, classes, watch=watch)
    columns = watch.columns(2)
    assert set(columns) == {"reached", "moved"}
    assert columns["reached"].tolist() == columns["moved"].tolist() == [True, True]
