"""Our attacks within a ball: uphill in the real victim's soft votes, towards an error or towards a credible one."""

import math

import torch
from torch import Tensor

from lightning_advknn.attacks.arguments import check_arguments
from lightning_advknn.attacks.balls import Norm, check_norm, heading, into_ball, per_image
from lightning_advknn.attacks.gradient_sign import LogitsFn
from lightning_advknn.attacks.neighbours import (
    ascend_margin,
    ascend_votes,
    check_neighbours,
    find_neighbours,
    vote_directions,
)
from lightning_advknn.classifiers import DkNNClassifier


def vote_ascent(
    victim: DkNNClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: LogitsFn,
    eps: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float = 0.1,
    credible: bool = False,
    neighbours: int = 150,
    temperature: float = 0.25,
    surrogate_share: float = 0.5,
    batch_size: int = 64,
) -> Tensor:
    """Within a ball, win votes for the wrong class that has most.

    Projected gradient steps, as BIM's, along the real victim's soft votes at the current image (`neighbours`) with some of
    the surrogate's gradient. It either stops at an image's first error, or goes on to make the error as credible as
    it can: credibility (Eq. 5) grows with the votes of the predicted class, so these are what it raises, against all
    other classes.

    Args:
        victim: kNN or DkNN.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to leave, int64 ``(B,)``.
        surrogate: Differentiable logits that imitate the victim.
        eps: Radius of the ball in pixel units.
        norm: Of the ball: ``l2`` or ``linf``.
        steps: Each asks the victim once.
        step_size: Length of the first step as a share of eps; it falls to a tenth of that along a cosine.
        credible: Whether to go on after the first error.
        neighbours: Rows of each layer that soft votes count, more than k.
        temperature: Of soft votes, see `vote_directions`.
        surrogate_share: Of the surrogate in the gradient, in [0, 1].
        batch_size: Images differentiated at once.

    Returns:
        Adversarial images, same shape and dtype, within the ball and [0, 1]: those that the victim gave most votes to a wrong
        class.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments(images, labels, ("steps",), eps=eps, steps=steps, step_size=step_size)
    check_norm(norm)
    if not 0 <= surrogate_share <= 1:
        raise ValueError(f"Expected `surrogate_share` to be in [0, 1], but got {surrogate_share}.")
    check_neighbours(victim, neighbours, temperature)
    if not len(images):
        return images
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.clone()
        adversarial, best = images, images
        most = torch.full_like(labels, -1)  # votes of a wrong class that won
        todo = torch.arange(len(images), device=images.device)
        for step in range(int(steps) + 1):
            now, own = adversarial[todo], labels[todo]
            found = find_neighbours(victim, now, neighbours)
            won = found.votes.sum(1).amax(1).where(found.fooled(own), -1)
            better = won > most[todo]
            most[todo] = torch.maximum(most[todo], won)
            best = best.index_copy(0, todo, torch.where(per_image(better, now), now, best[todo]))
            if step == steps:
                break
            if not credible:
                missing = won < 0
                todo, now, own, found = todo[missing], now[missing], own[missing], found.select(missing)
                if not len(todo):
                    break
            with torch.no_grad():
                logits = torch.cat([surrogate(part) for part in torch.split(now, batch_size)])
            targets = found.runner_up(own, logits)
            directions = vote_directions(victim, found, targets, None if credible else own, temperature)
            direction = (1 - surrogate_share) * ascend_votes(victim, now, directions, batch_size)
            direction += surrogate_share * ascend_margin(surrogate, now, targets, own, batch_size)
            stride = eps * step_size * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            moved = now - images[todo] + stride * heading(direction, norm)
            ball = into_ball(moved, torch.full((len(todo),), eps, device=images.device), norm)
            now = (images[todo] + ball).clamp(0, 1)
            adversarial = adversarial.index_copy(0, todo, now)
    return best
