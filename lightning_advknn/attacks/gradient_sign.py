"""FGSM (Goodfellow et al., arXiv 1412.6572) and BIM (Kurakin et al., arXiv 1611.01236).

Both raise the cross-entropy of a differentiable logits function: of the backbone in the paper's `Origin`, of
the surrogate in AdvKNN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import LogitsFn, check_arguments
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.step_graph import repeat
from lightning_advknn.functional import check_labels


@attack(on="logits", norm="linf", threads=True)
def fgsm(logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Fast Gradient Sign Method (Eq. 2), clipped to [0, 1].

    Args:
        logits_fn: Maps images ``(B, ...)`` to logits ``(B, C)``.
        images: float ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Step in pixel units, at least 0.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images and in [0, 1].

    Raises:
        ValueError: If an argument is out of range or the loss is not finite.
    """
    return bim(logits_fn, images, labels, eps=eps, step_size=eps, steps=1)


@attack(on="logits", norm="linf", threads=True)
def bim(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Basic Iterative Method (Eq. 3).

    Deviation: Eq. (3) as printed clips the step. Here, as in BIM's paper and in the authors' code, the whole
    perturbation is projected onto the eps ball after each step, and the image onto [0, 1].

    Args:
        logits_fn: Maps images ``(B, ...)`` to logits ``(B, C)``.
        images: float ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius of the Linf ball in pixel units, at least 0.
        step_size: Length of one step in pixel units, at least 0.
        steps: Number of steps, at least 0.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images and in [0, 1].

    Raises:
        ValueError: If an argument is out of range or the loss is not finite.
    """
    check_arguments(images, labels, whole=("steps",), eps=eps, step_size=step_size, steps=steps)
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.clone()
        lowest, highest = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)

        def step(adversarial: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = loss_and_gradient(logits_fn, adversarial, labels)
            adversarial = (adversarial + step_size * gradient.sign()).clamp(lowest, highest)
            return adversarial, losses + loss

        adversarial, losses = repeat(step, (images, images.new_zeros(())), int(steps), logits_fn)
        # Checked once, because reading a number makes a GPU wait; a sum keeps what is not finite.
        if not torch.isfinite(losses):
            raise ValueError(
                f"Expected a finite attack loss, but got {losses.item()}."
                " Check the attacked network's weights and outputs."
            )
    return adversarial


def loss_and_gradient(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy and its gradient with respect to each image, also inside `torch.no_grad`.

    The loss is summed over the batch, so the gradient of an image does not depend on its batch. Only images
    get a gradient.

    Args:
        logits_fn: Maps images ``(B, ...)`` to logits ``(B, C)``.
        images: float ``(B, ...)``.
        labels: int64 ``(B,)``.

    Returns:
        The loss, a scalar, and the gradient, same shape and dtype as the images.

    Raises:
        ValueError: If a label is not a class of the logits.
    """
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_fn(leaf)
        try:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        except IndexError:  # cheaper than checking the labels before each step
            check_labels(labels, len(images), logits.shape[1])
            raise
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
