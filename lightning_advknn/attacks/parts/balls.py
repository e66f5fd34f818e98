"""Balls of L2 and Linf around images."""

from typing import get_args

import torch
from torch import Tensor

from lightning_advknn.choices import Norm


def norm_of(value: object) -> str | None:
    """Name of a norm as libraries write it, ``l0``, ``l1``, ``l2`` or ``linf``; None of anything else.

    >>> [norm_of(value) for value in ("L2", "LINF", "inf", 2, torch.inf, "2", "l1", 0, "wasserstein")]
    ['l2', 'linf', 'linf', 'l2', 'linf', 'l2', 'l1', 'l0', None]
    """
    if isinstance(value, bool):
        return None
    order = str(value).strip().lower().replace("_", "").removeprefix("l").removesuffix(".0")
    return f"l{order}" if order in ("0", "1", "2", "inf") else None


def as_norm(value: object, of: str) -> Norm:
    """A norm as libraries write it.

    Args:
        value: Such as ``"L2"``, ``"inf"``, ``2`` or ``torch.inf``.
        of: Whose it is.

    Raises:
        ValueError: If it is neither L2 nor Linf.
    """
    match norm_of(value):
        case "l2":
            return "l2"
        case "linf":
            return "linf"
    raise ValueError(
        f"Expected the norm of {of} to be L2 or Linf, in which adversarials are reported and ranked here, but got {norm_of(value) or value!r}."
        " Take an attack in L2 or Linf, or this one with such a norm if it has one."
    )


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
