"""Norms of perturbations, for images in [0, 1]."""

import torch
from torch import Tensor


def l2_distortion(images: Tensor, adversarial: Tensor) -> Tensor:
    """True L2 distance of each image: ||x' - x||_2, in pixel units of [0, 1].

    Args:
        images: ``(B, ...)``.
        adversarial: Same shape.

    Returns:
        float64 ``(B,)``.

    Raises:
        ValueError: If shapes differ or pixels are integers.
    """
    difference = _perturbation(images, adversarial)
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return norms


def linf_distortion(images: Tensor, adversarial: Tensor) -> Tensor:
    """Linf distance of each image: its largest absolute change of a pixel, in pixel units of [0, 1].

    Args:
        images: ``(B, ...)``.
        adversarial: Same shape.

    Returns:
        float64 ``(B,)``.

    Raises:
        ValueError: If shapes differ or pixels are integers.
    """
    difference = _perturbation(images, adversarial)
    norms: Tensor = torch.linalg.vector_norm(difference, ord=torch.inf, dim=1)
    return norms


def authors_l2(l2: Tensor) -> Tensor:
    """L2 in the unit that the authors' code prints: true L2 * 255 / 784.

    Use it only to compare with the paper's figures: its 1.4909 is a true L2 of about 4.58.
    """
    return l2 * 255 / 784


def _perturbation(images: Tensor, adversarial: Tensor) -> Tensor:
    """Perturbations, float64 ``(B, D)``."""
    if (
        images.shape != adversarial.shape
        or not images.is_floating_point()
        or not adversarial.is_floating_point()
    ):
        raise ValueError(
            "Expected images and adversarials in [0, 1] of one shape, but got"
            f" {images.dtype} {tuple(images.shape)} and {adversarial.dtype} {tuple(adversarial.shape)}."
            " Divide uint8 by 255."
        )
    return (adversarial.double() - images.double()).flatten(1)
