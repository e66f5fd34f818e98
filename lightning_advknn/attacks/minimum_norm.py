"""Our minimum-norm attack on kNN and DkNN: a surrogate finds the boundary, real neighbours follow it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import LogitsFn, check_arguments
from lightning_advknn.attacks.parts.balls import check_norm, heading, length, onto_sphere, per_image
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.soft_votes import (
    ascend_margin,
    ascend_votes,
    check_neighbours,
    find_neighbours,
    vote_directions,
)
from lightning_advknn.choices import Norm
from lightning_advknn.classifiers import DkNN

_Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns which of B images are successes, bool ``(B,)``, and in which direction each moves, ``(B, ...)``."""

_SURROGATE_SHRINK = (0.2, 0.02)  # change of the radius in the first and the last step on the surrogate
_SHRINK = (0.08, 0.003)  # the same on the victim
# Length of the first and the last step, relative to the radius.
_STEP: dict[Norm, tuple[float, float]] = {"l2": (1.5, 0.03), "linf": (0.5, 0.02)}
_FARTHEST, _HALVINGS = 3.0, 6  # the victim's boundary is searched up to 3 times beyond the surrogate's


@attack(on="victim")
def minimum_norm(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: LogitsFn | None = None,
    norm: Norm = "l2",
    classes: int = 5,
    surrogate_steps: int = 20,
    steps: int = 20,
    neighbours: int = 150,
    temperature: float = 0.25,
    batch_size: int = 64,
) -> Tensor:
    """Find the smallest perturbation that fools the victim; the true minimum may be smaller.

    The descent is that of DDN (Rony et al., arXiv 1811.09600): the radius shrinks after each success and
    grows after each failure, and the perturbation turns along the gradient. It first runs on the surrogate,
    once for each of the likeliest wrong classes. Each perturbation found is lengthened until the victim
    itself is fooled. From the nearest of these, the descent runs on the victim, which decides on success; its
    gradient is that of the victim's soft votes at the current image (`parts.soft_votes`). Images for which
    this fails start once more between themselves and the nearest given image that the victim puts into
    another class, as in decision-based attacks (Brendel et al., arXiv 1712.04248).

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim; None for `DkNN.surrogate`.
        norm: Norm to minimise, ``l2`` or ``linf``.
        classes: Number of wrong classes to try, the likeliest by the surrogate.
        surrogate_steps: Steps towards each of them without a query.
        steps: Steps that query the victim once each.
        neighbours: Rows of each layer that soft votes count, more than k.
        temperature: Temperature of soft votes, see `vote_directions`.
        batch_size: Images differentiated at once.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the nearest that fooled the victim, else the last
        iterates.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments(
        images, labels, whole=("classes", "surrogate_steps", "steps"), victim=victim, classes=classes,
        surrogate_steps=surrogate_steps, steps=steps,
    )  # fmt: skip
    check_norm(norm)
    check_neighbours(victim, neighbours, temperature)
    if not classes >= 1:
        raise ValueError(f"Expected `classes` to be at least 1, but got {classes}.")
    if not len(images):
        return images

    def descend(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        own, left = images[rows], labels[rows]

        def look(adversarial: Tensor) -> tuple[Tensor, Tensor]:
            found = find_neighbours(victim, adversarial, neighbours)
            directions = vote_directions(victim, found, found.runner_up(left), left, temperature)
            return found.fooled(left), ascend_votes(victim, adversarial, directions, batch_size)

        return _confirm(own, _descend(own, start, look, steps, norm, _SHRINK), left, victim)

    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.clone()
        classified = victim.predict(images)
        through = victim.surrogate() if surrogate is None else surrogate
        crossed = cross_boundary(victim, images, labels, through, norm, classes, surrogate_steps, batch_size)
        found, fooled = descend(torch.arange(len(images), device=images.device), crossed)
        rows = (~fooled).nonzero().squeeze(1)
        starts, others = _nearest_others(images, classified, labels, rows, norm)
        rows, others = rows[starts], others[starts]
        if len(rows):
            start, _ = _reach(victim, images[rows], others, labels[rows])
            found[rows] = descend(rows, start)[0]
        return torch.where(per_image(classified == labels, images), found, images)


def cross_boundary(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    surrogate: LogitsFn,
    norm: Norm,
    classes: int,
    steps: int,
    batch_size: int,
) -> Tensor:
    """Find the nearest images that fool the victim, on lines through the surrogate's boundaries.

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim.
        norm: Norm to minimise.
        classes: Number of wrong classes to try, the likeliest first.
        steps: Steps towards each of them.
        batch_size: Images differentiated at once.

    Returns:
        Images of the same shape. If nothing fooled the victim, the farthest image tried.
    """

    def towards(targets: Tensor) -> _Look:
        def look(adversarial: Tensor) -> tuple[Tensor, Tensor]:
            direction = ascend_margin(surrogate, adversarial, targets, labels, batch_size)
            return _logits(surrogate, adversarial, batch_size).argmax(1) == targets, direction

        return look

    likeliest = _logits(surrogate, images, batch_size).scatter(1, labels[:, None], -torch.inf)
    nearest, size = images, torch.full((len(images),), torch.inf, device=images.device)
    for targets in likeliest.argsort(1, descending=True)[:, :-1][:, :classes].T:  # the last is the label
        near = _descend(images, images, towards(targets), steps, norm, _SURROGATE_SHRINK)
        reached, fooled = _reach(victim, images, near, labels)
        distance = length(reached - images, norm)
        better = (fooled & (distance < size)) | (size.isinf() & ~fooled)
        nearest = torch.where(per_image(better, images), reached, nearest)
        size = torch.where(fooled, torch.minimum(size, distance), size)
    return nearest


def _descend(
    images: Tensor,
    start: Tensor,
    look: _Look,
    steps: int,
    norm: Norm,
    shrink: tuple[float, float],
) -> Tensor:
    """Run DDN's descent and return the nearest success of each image, else the last iterate.

    Args:
        images: Clean images ``(B, ...)``.
        start: First iterates. If they are the clean images, the radius starts at 1 (L2) or .1 (Linf).
        look: Decides on success and gives the direction.
        steps: Number of steps.
        norm: Norm of perturbations.
        shrink: Relative change of the radius in the first and the last step.
    """
    perturbation, best = start - images, torch.full((len(images),), torch.inf, device=images.device)
    found, radius = start, length(perturbation, norm)
    radius = torch.where(radius > 0, radius, 1.0 if norm == "l2" else 0.1)
    for step in range(steps + 1):
        adversarial = images + perturbation
        success, direction = look(adversarial)
        size = length(perturbation, norm)
        better = success & (size < best)
        best = torch.where(better, size, best)
        found = torch.where(per_image(better | best.isinf(), images), adversarial, found)
        if step == steps:
            break
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        change, stride = (last + (first - last) * cosine for first, last in (shrink, _STEP[norm]))
        radius = torch.where(success, torch.minimum(radius, best) * (1 - change), radius * (1 + change))
        radius = torch.minimum(radius, best * (1 - shrink[1]))
        moved = perturbation + per_image(radius * stride, images) * heading(direction, norm)
        perturbation = (images + onto_sphere(moved, radius, norm)).clamp(0, 1) - images
    return found


def _reach(victim: DkNN, images: Tensor, near: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Search lines from images through others for the first that fools the victim; also whether any does."""
    low = torch.zeros(len(images), device=images.device)
    high, scale = torch.full_like(low, _FARTHEST), torch.ones_like(low)
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(_HALVINGS):
        moved = (images + per_image(scale, images) * (near - images)).clamp(0, 1)
        success = find_neighbours(victim, moved, victim.k + 1).fooled(labels)
        high, low = torch.where(success, scale, high), torch.where(success, low, scale)
        scale, fooled = (low + high) / 2, fooled | success
    return (images + per_image(high, images) * (near - images)).clamp(0, 1), fooled


def _confirm(images: Tensor, found: Tensor, labels: Tensor, victim: DkNN) -> tuple[Tensor, Tensor]:
    """Lengthen perturbations that fool the scan, but not the victim, by .5 % a time; also which fool it."""
    for _ in range(8):
        fooled = victim.predict(found) != labels
        if fooled.all():
            return found, fooled
        farther = (images + 1.005 * (found - images)).clamp(0, 1)
        found = torch.where(per_image(fooled, images), found, farther)
    return found, victim.predict(found) != labels


def _nearest_others(
    images: Tensor, classified: Tensor, labels: Tensor, rows: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Find the nearest image of another predicted class for some rows; first whether there is one."""
    other = classified != labels[rows][:, None]
    p = 2.0 if norm == "l2" else torch.inf
    distances = torch.cdist(images[rows].flatten(1), images.flatten(1), p=p)
    return other.any(1), images[distances.masked_fill(~other, torch.inf).argmin(1)]


def _logits(logits_fn: LogitsFn, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits_fn(part) for part in torch.split(images, batch_size)])
