"""Our minimum-norm attack on kNN and DkNN: along the surrogate to the boundary, then along it by the real neighbours."""

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
"""Tells of images ``(B, ...)`` which are successes, bool ``(B,)``, and which way to go, unit steps ``(B, ...)``."""

_SURROGATE_SHRINK = (0.2, 0.02)  # of the radius a step, first and last, while only the surrogate is asked
_SHRINK = (0.05, 0.005)  # the same once the victim is
_STEP = (0.5, 0.02)  # length of a step, as a share of the radius, first and last
_FARTHEST, _HALVINGS = 3.0, 6  # how much farther than the surrogate's boundary the victim's is looked for


@attack(on="victim")
def minimum_norm(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: LogitsFn | None = None,
    norm: Norm = "l2",
    classes: int = 3,
    surrogate_steps: int = 40,
    steps: int = 60,
    neighbours: int = 150,
    temperature: float = 0.25,
    batch_size: int = 64,
) -> Tensor:
    """A small perturbation that the real victim falls for: the smallest one found, so an upper bound of the smallest there is.

    As DDN (Rony et al., arXiv 1811.09600), whose radius shrinks after each success and grows after each failure while
    the perturbation turns along the gradient. First the surrogate stands in for the victim, once for each of the likeliest wrong
    classes; each perturbation is then lengthened until the victim itself is fooled. From the nearest of these on the victim
    decides on success, and the gradient is that of its own soft votes at the current image (`neighbours`). Where that comes to
    nothing, it starts once more on the way to the nearest of the other images that the victim takes for another class, as decision-based
    attacks do (Brendel et al., arXiv 1712.04248).

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim; None for the victim's own.
        norm: What is to be small: ``l2`` or ``linf``.
        classes: Wrong classes to try: those that the surrogate finds likeliest.
        surrogate_steps: Steps to each of them without the victim.
        steps: Steps with it; each asks it once.
        neighbours: Rows of each layer that soft votes count, more than k.
        temperature: Of soft votes, see `vote_directions`.
        batch_size: Images differentiated at once.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: of those that fooled the victim the nearest, else the last.

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
    """The nearest images that fool the victim on the way to, and beyond, the surrogate's boundary with each class.

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim.
        norm: What is to be small.
        classes: Wrong classes to try, likeliest first.
        steps: To each of them.
        batch_size: Images differentiated at once.

    Returns:
        Same shape; where nothing fooled the victim, one beyond all that were tried.
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
    """The nearest of the images tried that are successes; the last, where none is.

    Args:
        images: Clean, ``(B, ...)``.
        start: First images tried; where they are the clean ones the radius starts at 1 (L2) or .1 (Linf).
        look: What decides and steers.
        steps: Number of steps.
        norm: Of perturbations.
        shrink: By which share the radius changes in a step, first and last.
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
        change, stride = (last + (first - last) * cosine for first, last in (shrink, _STEP))
        radius = torch.where(success, torch.minimum(radius, best) * (1 - change), radius * (1 + change))
        radius = torch.minimum(radius, best * (1 - shrink[1]))
        moved = perturbation + per_image(radius * stride, images) * heading(direction, norm)
        perturbation = (images + onto_sphere(moved, radius, norm)).clamp(0, 1) - images
    return found


def _reach(victim: DkNN, images: Tensor, near: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """From images towards others and beyond, about the first that fools the victim, and whether any does."""
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
    """Lengthen what fools the scan, but not the victim itself, by half a percent at a time; and which fool it in the end."""
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
    """For some images, whether any is classified otherwise than they shall stay, bool ``(n,)``, and the nearest of these."""
    other = classified != labels[rows][:, None]
    p = 2.0 if norm == "l2" else torch.inf
    distances = torch.cdist(images[rows].flatten(1), images.flatten(1), p=p)
    return other.any(1), images[distances.masked_fill(~other, torch.inf).argmin(1)]


def _logits(logits_fn: LogitsFn, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits_fn(part) for part in torch.split(images, batch_size)])
