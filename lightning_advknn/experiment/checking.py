"""What is asked once more about stored images, so that a report can tell a robust victim from a failed attack.

For the merge: `experiment/rechecks.py` and the stages that keep its answers take the place of this file.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_advknn.attacks.gradient_sign import loss_and_gradient
from lightning_advknn.attacks.parts.arguments import LogitsFn
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import observe

LOOKED_AT = 100  # images of each run that are asked about again
NEIGHBOURS = 5  # nearest training images that a picture shows
ALONE, TOGETHER = 10, 7  # the first so many are asked one by one, the next half seven at a time
_BATCH = 50  # images differentiated at once

if TYPE_CHECKING:
    from lightning_advknn.experiment.run import ExperimentRun


def asked_again(run: "ExperimentRun", method: str, attack: str | None) -> dict[str, Tensor]:
    """As `ExperimentRun.asked_again`."""
    dknn, n = run.attacked.dknn, len(run.test)
    rows, spread = run.rows(method, attack), _positions(n)
    _, images = run.images_of(method, attack, range(len(spread)))
    classes, votes = (answer.cpu() for answer in observe(dknn, images))
    first = slice(0, len(spread))
    again = (votes != rows["votes_after"][first]).flatten(1).any(1) | (classes != rows["dnn_after"][first])
    _, images = run.images_of(method, attack, spread.tolist())
    classes, votes = (answer.cpu() for answer in ask_in_other_batches(dknn, images))
    # A neighbour at a tie that rounding decides takes one vote of a class and gives it to another.
    apart = ((votes - rows["votes_after"][spread]).abs().sum(2) > 2).any(1)
    return {"again": again, "apart": apart | (classes != rows["dnn_after"][spread])}


def gradients(run: "ExperimentRun", method: str) -> dict[str, Tensor]:
    """As `ExperimentRun.gradients`."""
    from lightning_advknn.experiment.settings import ORIGIN

    positions = _positions(len(run.test))
    images, labels, _ = run.test.__getitems__(positions.tolist())
    if run.experiment.label_source == "knn":
        labels = run.rows(ORIGIN, None)["knn_before"][positions]
    with prepared(run.logits_fn(method)) as logits_fn:
        parts = [
            _gradient(logits_fn, some.to(run.device), own.to(run.device)).flatten(1)
            for some, own in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
        ]
    found = torch.cat(parts).cpu()
    finite = found.isfinite().all(1)
    return {"positions": positions, "zero": finite & ~found.any(1), "infinite": ~finite}


@torch.no_grad()
def neighbours(dknn: DkNN, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """As `ExperimentRun.neighbours`."""
    features = dknn.network.features(images.to(dknn.calibration_votes.device))
    found = {}
    for layer, bank in dknn.banks.items():
        _, rows = bank.search(features[layer], NEIGHBOURS)
        found[layer] = rows.cpu(), bank.labels[rows].cpu()
    return found


@torch.no_grad()
def ask_in_other_batches(dknn: DkNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's classes int64 ``(n,)`` and DkNN's votes int64 ``(n, L, C)``, as `observe`, but by other batches.

    The network gets `ALONE` images one by one, half of the others `TOGETHER` at a time, and the rest in
    reversed order at once; the banks are searched once, in the order that this gives.
    """
    order = list(range(len(images)))
    alone, half = order[:ALONE], order[ALONE : ALONE + len(order[ALONE:]) // 2]
    batches = [[each] for each in alone]
    batches += [half[start : start + TOGETHER] for start in range(0, len(half), TOGETHER)]
    batches += [order[: ALONE + len(half) - 1 : -1]] if len(order) > ALONE + len(half) else []
    asked = [dknn.network.logits_and_features(images[batch]) for batch in batches]
    votes = dknn.votes({layer: torch.cat([each[layer] for _, each in asked]) for layer in dknn.layers})
    classes = torch.cat([logits.argmax(1) for logits, _ in asked])
    back = torch.tensor([each for batch in batches for each in batch], device=votes.device).argsort()
    return classes[back], votes[back]


def _positions(n: int) -> Tensor:
    return torch.linspace(0, n - 1, min(n, LOOKED_AT)).round().long()


def _gradient(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """That of the cross-entropy; zero where the network gives none."""
    try:
        return loss_and_gradient(logits_fn, images, labels)[1]
    except RuntimeError:  # autograd: nothing in the network can be differentiated
        return torch.zeros_like(images)
