"""Our attack on credibility: errors of DkNN that it finds as credible as clean images."""

import math

import torch
from torch import Tensor

from lightning_advknn.attacks.minimum_norm import cross_boundary
from lightning_advknn.attacks.parts.arguments import LogitsFn, check_arguments
from lightning_advknn.attacks.parts.balls import check_norm, heading, into_ball, per_image
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.soft_votes import (
    ascend_votes,
    check_neighbours,
    find_neighbours,
    vote_directions,
)
from lightning_advknn.choices import Norm
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import dknn_prediction

_STRIDE = (0.1, 0.01)  # length of the first and the last step, relative to eps


@attack(on="victim")
def credible(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: LogitsFn | None = None,
    eps: float,
    norm: Norm = "l2",
    classes: int = 5,
    surrogate_steps: int = 20,
    steps: int = 60,
    neighbours: int = 300,
    temperature: float = 0.25,
    batch_size: int = 64,
) -> Tensor:
    """Find the error within a ball that is most credible to the victim.

    Credibility (Eq. 5) grows with the votes of the predicted class and depends on nothing else. The attack
    starts at the nearest error (`cross_boundary`). From there, projected gradient steps raise the soft votes
    (`parts.soft_votes`) of the winning class against those of all others.

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim; None for `DkNN.surrogate`.
        eps: Radius of the ball in pixel units.
        norm: Norm of the ball, ``l2`` or ``linf``.
        classes: Number of wrong classes to start from, as in `minimum_norm`.
        surrogate_steps: Steps towards each of them without a query.
        steps: Steps that query the victim once each.
        neighbours: Rows of each layer that soft votes count, more than k.
        temperature: Temperature of soft votes, see `vote_directions`.
        batch_size: Images differentiated at once.

    Returns:
        Adversarial images, same shape and dtype, within the ball and [0, 1]: the errors with the most votes
        for the winning class, else the last iterates.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments(
        images, labels, whole=("classes", "surrogate_steps", "steps"), victim=victim, eps=eps,
        classes=classes, surrogate_steps=surrogate_steps, steps=steps,
    )  # fmt: skip
    check_norm(norm)
    check_neighbours(victim, neighbours, temperature)
    if not len(images):
        return images
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.clone()
        radius = torch.full((len(images),), eps, dtype=images.dtype, device=images.device)
        through = victim.surrogate() if surrogate is None else surrogate
        now = cross_boundary(victim, images, labels, through, norm, classes, surrogate_steps, batch_size)
        now = (images + into_ball(now - images, radius, norm)).clamp(0, 1)
        best, most = now, torch.full_like(labels, -1)
        for step in range(int(steps) + 1):
            found = find_neighbours(victim, now, neighbours)
            fooled = found.fooled(labels)
            votes = found.votes.sum(1).amax(1).where(fooled, -1)
            better = (votes > most) | (most < 0)
            best, most = torch.where(per_image(better, now), now, best), torch.maximum(most, votes)
            if step == steps:
                break
            rising = torch.where(fooled, dknn_prediction(found.votes), found.runner_up(labels))
            directions = vote_directions(victim, found, rising, None, temperature)
            first, last = _STRIDE
            stride = eps * (last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2)
            moved = now - images + stride * heading(ascend_votes(victim, now, directions, batch_size), norm)
            now = (images + into_ball(moved, radius, norm)).clamp(0, 1)
        return best
