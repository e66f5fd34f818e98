"""Descent of a loss over images: the range of pixels, the steps, and which iterates to keep."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_advknn.attacks.parts.balls import into_ball
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import l2_distortion

_INSIDE = 1 - 1e-4  # images start inside the range, because tanh has no gradient at its limits

LossFn = Callable[[Tensor], Tensor]
"""Maps images ``(B, ...)`` to losses ``(B,)``."""


class Box:
    """Pixels between bounds, as the tanh of unbounded variables.

    Args:
        lowest: Lower bounds ``(B, ...)``, within [0, 1].
        highest: Upper bounds, same shape.
    """

    def __init__(self, lowest: Tensor, highest: Tensor) -> None:
        self.lowest, self.highest = lowest, highest
        self._centre, self._half = (highest + lowest) / 2, (highest - lowest) / 2

    def variables(self, images: Tensor) -> Tensor:
        """Variables of these images, which require a gradient; images at a bound start slightly inside."""
        tiny = torch.finfo(images.dtype).tiny  # for a range of width 0
        inside = ((images - self._centre) / self._half.clamp(min=tiny)).clamp(-_INSIDE, _INSIDE)
        return torch.atanh(inside).requires_grad_()

    def images(self, variables: Tensor) -> Tensor:
        """Images ``(B, ...)`` of variables, differentiable; rounding may leave the bounds."""
        return self._centre + self._half * torch.tanh(variables)

    @torch.no_grad()
    def stored(self, variables: Tensor) -> Tensor:
        """Images of variables, clamped to the bounds, as they are judged and returned."""
        return self.images(variables).clamp(self.lowest, self.highest)


def descend(
    loss_fn: LossFn, variables: Tensor, optimizer: Optimizer, steps: int, every: int
) -> Iterator[None]:
    """Lower a loss ``(B,)`` by steps, and yield after every `every` steps and after the last."""
    for step in range(1, int(steps) + 1):
        with torch.enable_grad():
            # A sum, so that the gradient of an image does not depend on its batch.
            (variables.grad,) = torch.autograd.grad(loss_fn(variables).sum(), variables)
        optimizer.step()
        if step % every == 0 or step == steps:
            yield


class Best:
    """The iterates to return: the last or the nearest success of each image, else its last iterate.

    Args:
        images: Clean images ``(B, ...)``, the first iterates.
        smallest: Whether to keep the success with the smallest L2 instead of the last.
    """

    def __init__(self, images: Tensor, smallest: bool) -> None:
        self.adversarial, self._images, self._smallest = images.clone(), images, smallest
        self._norms = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)

    def offer(self, adversarial: Tensor, fooled: Tensor) -> None:
        """Keep the better iterates of ``(B, ...)``; `fooled`, bool ``(B,)``, says which are successes."""
        norms = l2_distortion(self._images, adversarial)
        better = fooled & (norms < self._norms) if self._smallest else fooled
        taken = better | self._norms.isinf()
        self.adversarial[taken] = adversarial[taken]
        self._norms = torch.where(better, norms, self._norms)


class Bisection:
    """Search of the smallest weight of the attack's loss at which it succeeds, for each image.

    Weights are multiplied by ten until the attack succeeds, then bisected.

    Args:
        weights: First weights ``(B,)``.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._low, self._high = torch.zeros_like(weights), torch.full_like(weights, torch.inf)

    def narrow(self, succeeded: Tensor) -> None:
        """Choose the next weights; `succeeded`, bool ``(B,)``, says which were large enough."""
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
    """Run Adam and return the last iterate that fooled the victim, else the last one.

    Args:
        victim: Queried after every `check_every` steps and after the last.
        images: Clean images ``(B, ...)``, the first iterates.
        labels: Classes to move away from, int64 ``(B,)``.
        loss_fn: The loss that is lowered.
        box: Bounds of the pixels.
        steps: Number of steps.
        lr: Learning rate of Adam.
        check_every: At least 1.
        radius: Radius of an L2 ball onto which iterates are projected before each query.
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
    """Logit of the own class, and logsumexp of the logits of all others, ``(B, L)`` each.

    Args:
        logits: ``(B, L, C)``.
        labels: Own classes, int64 ``(B,)``.
    """
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.gather(2, own).squeeze(2), logits.scatter(2, own, -torch.inf).logsumexp(2)


def ascent(logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy, summed over layers and scaled by a positive factor for each image.

    The cross-entropy is ``softplus(others - own)`` (`own_and_others`). In float32 its gradient vanishes if
    the own class is far ahead. So the slopes of softplus are divided by their sum over layers, which does not
    change the direction.

    Args:
        logits_fn: Maps images ``(B, ...)`` to the logits ``(B, L, C)`` of each layer.
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
