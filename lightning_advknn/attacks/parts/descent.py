"""Descending a loss over images: the box of pixels, the steps, and what of them to keep."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_advknn.attacks.parts.balls import into_ball
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import l2_distortion

_INSIDE = 1 - 1e-4  # how far towards the box's edge an image may start: on it, tanh has no gradient

LossFn = Callable[[Tensor], Tensor]
"""A loss ``(B,)`` of images ``(B, ...)``."""


class Box:
    """Pixels between bounds, written as tanh of variables without any.

    Args:
        lowest: ``(B, ...)``, within [0, 1].
        highest: Same shape.
    """

    def __init__(self, lowest: Tensor, highest: Tensor) -> None:
        self.lowest, self.highest = lowest, highest
        self._centre, self._half = (highest + lowest) / 2, (highest - lowest) / 2

    def variables(self, images: Tensor) -> Tensor:
        """What gives these images, or on the edge nearly these; asks for a gradient."""
        tiny = torch.finfo(images.dtype).tiny  # a box of no width
        inside = ((images - self._centre) / self._half.clamp(min=tiny)).clamp(-_INSIDE, _INSIDE)
        return torch.atanh(inside).requires_grad_()

    def images(self, variables: Tensor) -> Tensor:
        """Images ``(B, ...)``, differentiable; beyond the bounds by rounding alone."""
        return self._centre + self._half * torch.tanh(variables)

    @torch.no_grad()
    def stored(self, variables: Tensor) -> Tensor:
        """The same within the bounds, as they are judged and returned."""
        return self.images(variables).clamp(self.lowest, self.highest)


def descend(
    loss_fn: LossFn, variables: Tensor, optimizer: Optimizer, steps: int, every: int
) -> Iterator[None]:
    """Take so many steps down a loss ``(B,)``, with a pause after `every` steps and after the last."""
    for step in range(1, int(steps) + 1):
        with torch.enable_grad():
            # A sum, so that an image's gradient does not depend on its batch.
            (variables.grad,) = torch.autograd.grad(loss_fn(variables).sum(), variables)
        optimizer.step()
        if step % every == 0 or step == steps:
            yield


class Best:
    """The adversarials to return: an image's last success, or its smallest, or else its last try.

    Args:
        images: Clean images ``(B, ...)``: the first try.
        smallest: Keep the success nearest to the image in L2, not the last.
    """

    def __init__(self, images: Tensor, smallest: bool) -> None:
        self.adversarial, self._images, self._smallest = images.clone(), images, smallest
        self._norms = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)

    def offer(self, adversarial: Tensor, fooled: Tensor) -> None:
        """Take what is better of tries ``(B, ...)``, which fooled the victim or not, bool ``(B,)``."""
        norms = l2_distortion(self._images, adversarial)
        better = fooled & (norms < self._norms) if self._smallest else fooled
        taken = better | self._norms.isinf()
        self.adversarial[taken] = adversarial[taken]
        self._norms = torch.where(better, norms, self._norms)


class Bisection:
    """The smallest weight of the attack's loss at which it succeeds, for each image: ten times as much until it does, then halves.

    Args:
        weights: To start from, ``(B,)``.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._low, self._high = torch.zeros_like(weights), torch.full_like(weights, torch.inf)

    def narrow(self, succeeded: Tensor) -> None:
        """Choose the next weights, by whether these were enough, bool ``(B,)``."""
        self._low = torch.where(succeeded, self._low, self.weights)
        self._high = torch.where(succeeded, self.weights, self._high)
        middle = (self._low + self._high) / 2
        self.weights = torch.where(self._high.isinf(), 10 * self.weights, middle)


def last_success(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    loss_fn: LossFn,
    box: Box,
    *,
    steps: int,
    lr: float,
    check_every: int,
    radius: float = torch.inf,
) -> Tensor:
    """Where Adam's descent last fooled the victim, or else ended.

    Args:
        victim: Is asked after `check_every` steps and after the last.
        images: Clean images ``(B, ...)``, from which it starts.
        labels: Classes to move away from, int64 ``(B,)``.
        loss_fn: What is lowered.
        box: Bounds of the pixels.
        steps: Number of steps.
        lr: Adam's.
        check_every: At least 1.
        radius: Of an L2 ball, onto which iterates are pulled straight back before the victim sees them.
    """
    variables = box.variables(images)
    best, optimizer = Best(images, smallest=False), Adam([variables], lr=lr)
    for _ in descend(lambda w: loss_fn(box.images(w)), variables, optimizer, steps, check_every):
        adversarial = box.stored(variables)
        if radius < torch.inf:
            ball = torch.full((len(images),), radius, dtype=images.dtype, device=images.device)
            adversarial = (images + into_ball(adversarial - images, ball, "l2")).clamp(0, 1)
        best.offer(adversarial, victim.predict(adversarial) != labels)
    return best.adversarial


def squared_l2(images: Tensor, adversarial: Tensor) -> Tensor:
    """``||x' - x||^2``, differentiable, ``(B,)``."""
    return (adversarial - images).flatten(1).square().sum(1)


def own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The own class's logit, and the logarithm of the sum of exponentials of all others', ``(B, L)``.

    Args:
        logits: ``(B, L, C)``.
        labels: Own classes, int64 ``(B,)``.
    """
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.gather(2, own).squeeze(2), logits.scatter(2, own, -torch.inf).logsumexp(2)


def ascent(logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy, summed over layers, times a positive factor for each image.

    Cross-entropy is ``softplus(others - own)`` (`own_and_others`). Its own gradient is lost in float32 wherever the own class
    is far ahead; here slopes of softplus in the layers are divided by their sum, which turns no direction.

    Args:
        logits_fn: Maps images ``(B, ...)`` to logits ``(B, L, C)`` of each layer.
        images: float ``(B, ...)``.
        labels: int64 ``(B,)``.

    Returns:
        Same shape as the images.
    """
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        own, others = own_and_others(logits_fn(leaf), labels)
        slopes = F.logsigmoid(others - own).softmax(1).detach()
        (gradient,) = torch.autograd.grad((slopes * (others - own)).sum(), leaf)
    return gradient
