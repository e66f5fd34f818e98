"""What attacks share that weigh guides of every class against each other."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_advknn.attacks.guided import as_lengths
from lightning_advknn.attacks.guides import features_of, nearest_of_each_class
from lightning_advknn.classifiers import DkNNClassifier


def nearest_in_each_layer(
    victim: DkNNClassifier, images: Tensor, m: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The m training images of every class that are nearest to images in each layer, nearest first.

    Args:
        victim: Whose banks hold them.
        images: float32 ``(B, ...)``.
        m: Of each class.

    Returns:
        By layer, squared distances as of `Guides`, float64 ``(B, C, m)``, and bank rows, int64 ``(B, C, m)``.

    Raises:
        ValueError: If a class has fewer than m rows.
    """
    squares, rows = {}, {}
    for layer, features in features_of(victim, images).items():
        bank = victim.banks[layer]
        distances, rows[layer] = nearest_of_each_class(bank, features, m)
        squares[layer] = as_lengths(bank, distances).square()
    return squares, rows


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
