"""Balls of L2 and Linf around images."""

from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]
"""How a perturbation is measured: its Euclidean length, or the largest change of a pixel; both in pixel units of [0, 1]."""


def check_norm(norm: Norm) -> None:
    """Raise a ValueError unless it is one."""
    if norm not in get_args(Norm):
        raise ValueError(f"Expected `norm` to be one of {get_args(Norm)}, but got {norm!r}.")


def length(perturbation: Tensor, norm: Norm) -> Tensor:
    """Norm of each perturbation ``(B, ...)``, in its dtype, ``(B,)``."""
    order = 2 if norm == "l2" else torch.inf
    norms: Tensor = torch.linalg.vector_norm(perturbation.flatten(1), ord=order, dim=1)
    return norms


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values ``(B,)`` in a shape that scales images ``(B, ...)``."""
    return values.view(-1, *[1] * (images.dim() - 1))


def unit(perturbation: Tensor) -> Tensor:
    """Each perturbation over its L2 norm; zero stays zero."""
    return perturbation / per_image(length(perturbation, "l2").clamp(min=1e-20), perturbation)


def heading(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of steepest ascent: the unit gradient, or its sign."""
    return unit(gradient) if norm == "l2" else gradient.sign()


def into_ball(perturbation: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """The nearest point of the ball around 0 with a radius ``(B,)`` for each perturbation ``(B, ...)``."""
    radius = per_image(radius, perturbation)
    if norm == "linf":
        return torch.minimum(torch.maximum(perturbation, -radius), radius)
    size = per_image(length(perturbation, "l2").clamp(min=1e-20), perturbation)
    return perturbation * (radius / size).clamp(max=1.0)


def onto_sphere(perturbation: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """As `into_ball`, but a perturbation within the L2 ball is lengthened to its radius; zero stays zero."""
    if norm == "linf":
        return into_ball(perturbation, radius, norm)
    return per_image(radius, perturbation) * unit(perturbation)
