"""What is asked once more about stored images, so that a report can tell a robust victim from a failed attack."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_advknn.attacks.gradient_sign import loss_and_gradient
from lightning_advknn.attacks.parts.arguments import LogitsFn
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import observe
from lightning_advknn.functional import float32_arithmetic

_LOOKED_AT = 100  # images of each run that are asked about again
PICTURED = 2  # images that are shown with their nearest training images
_NEIGHBOURS = 5  # of each, in each layer
_ALONE, _TOGETHER = 10, 7  # the first images are asked one by one, half of the others seven at a time
_BATCH = 50  # images differentiated at once


def looked_at(n: int) -> Tensor:
    """Positions of up to `_LOOKED_AT` of n images, evenly spaced, int64."""
    return torch.linspace(0, n - 1, min(n, _LOOKED_AT)).round().long()


def changed_in_order(dknn: DkNN, images: Tensor, dnn: Tensor, votes: Tensor) -> Tensor:
    """Which images get other votes or another class when they are asked about again in the same order, bool ``(n,)``.

    Args:
        dknn: The victim.
        images: The first ones of a stored run, float32 ``(n, channels, H, W)``.
        dnn: The network's classes as kept, int64 ``(n,)``.
        votes: As kept, int64 ``(n, L, C)``.
    """
    classes, found = observe(dknn, images)
    changed = (found.cpu() != votes).flatten(1).any(1)
    return changed if classes is None else changed | (classes.cpu() != dnn)


def changed_in_batches(dknn: DkNN, images: Tensor, dnn: Tensor, votes: Tensor) -> Tensor:
    """The same for other batches. A tie that rounding decides may move one vote of a layer to another class."""
    classes, found = (answer.cpu() for answer in _ask_in_other_batches(dknn, images))
    return ((found - votes).abs().sum(2) > 2).any(1) | (classes != dnn)


@torch.no_grad()
@float32_arithmetic()
def _ask_in_other_batches(dknn: DkNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """The network's classes int64 ``(n,)`` and DkNN's votes int64 ``(n, L, C)``, as `observe`, but by other batches.

    The network gets `_ALONE` images one by one, half of the others `_TOGETHER` at a time, and the rest in
    reversed order at once. The banks are searched once, in the order that this gives.
    """
    order = list(range(len(images)))
    alone, half = order[:_ALONE], order[_ALONE : _ALONE + len(order[_ALONE:]) // 2]
    batches = [[each] for each in alone]
    batches += [half[start : start + _TOGETHER] for start in range(0, len(half), _TOGETHER)]
    batches += [order[: _ALONE + len(half) - 1 : -1]] if len(order) > _ALONE + len(half) else []
    asked = [dknn.network.logits_and_features(images[batch]) for batch in batches]
    votes = dknn.votes({layer: torch.cat([each[layer] for _, each in asked]) for layer in dknn.layers})
    classes = torch.cat([logits.argmax(1) for logits, _ in asked])
    back = torch.tensor([each for batch in batches for each in batch], device=votes.device).argsort()
    return classes[back], votes[back]


@float32_arithmetic()
def gradients(target: LogitsFn, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether the cross-entropy of what an attack differentiates has a usable gradient at clean images.

    Args:
        target: The logits function.
        images: float32 ``(n, channels, H, W)``.
        labels: int64 ``(n,)``.

    Returns:
        ``zero``: all of the gradient is zero; ``infinite``: some of it is not finite; each bool ``(n,)``.
    """
    with prepared(target) as logits_fn:
        parts = [
            _gradient(logits_fn, some, own).flatten(1)
            for some, own in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
        ]
    found = torch.cat(parts)
    finite = found.isfinite().all(1)
    return {"zero": finite & ~found.any(1), "infinite": ~finite}


def _gradient(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient; zero where the network gives none."""
    try:
        return loss_and_gradient(logits_fn, images, labels)[1]
    except RuntimeError:  # autograd: nothing in the network can be differentiated
        return torch.zeros_like(images)


@torch.no_grad()
@float32_arithmetic()
def neighbours(dknn: DkNN, images: Tensor) -> dict[str, Tensor]:
    """The `_NEIGHBOURS` nearest training images in each layer.

    Returns:
        ``rows/<layer>``: bank rows, and ``labels/<layer>``: their labels; int64 ``(n, _NEIGHBOURS)`` each.
    """
    found: dict[str, Tensor] = {}
    for layer, features in dknn.network.features(images).items():
        bank = dknn.banks[layer]
        rows = bank.search(features, min(_NEIGHBOURS, len(bank)))[1]
        found |= {f"rows/{layer}": rows, f"labels/{layer}": bank.labels[rows]}
    return found


def telling_rows(rows: Mapping[str, Tensor], n: int) -> Sequence[int]:
    """Positions of up to n images that both victims classify right and, attacked, wrong; one of each class first.

    Args:
        rows: Columns of `evaluation.Rows`.
        n: At most.
    """
    label = rows["label"]
    right = (rows["knn_before"] == label) & (rows["dknn_before"] == label)
    wrong = (rows["knn_after"] != label) & (rows["dknn_after"] != label)
    fooled = (right & wrong).nonzero().squeeze(1).tolist() or list(range(len(label)))
    first_of_class = {int(label[position]): position for position in reversed(fooled)}
    chosen = sorted(first_of_class.values())
    return (chosen + [position for position in fooled if position not in chosen])[:n]
