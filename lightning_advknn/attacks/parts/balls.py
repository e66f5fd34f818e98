"""Balls of L2 and Linf around images."""

from typing import get_args

import torch
from torch import Tensor

from lightning_advknn.choices import Norm


def norm_of(value: object) -> str | None:
    """Recognise a norm in any spelling of libraries: ``l0``, ``l1``, ``l2`` or ``linf``; else None.

    >>> [norm_of(value) for value in ("L2", "LINF", "inf", 2, torch.inf, "2", "l1", 0, "wasserstein")]
    ['l2', 'linf', 'linf', 'l2', 'linf', 'l2', 'l1', 'l0', None]
    """
    if isinstance(value, bool):
        return None
    order = str(value).strip().lower().replace("_", "").removeprefix("l").removesuffix(".0")
    return f"l{order}" if order in ("0", "1", "2", "inf") else None


def as_norm(value: object, of: str) -> Norm:
    """Convert a norm in any spelling of libraries.

    Args:
        value: For example ``"L2"``, ``"inf"``, ``2`` or ``torch.inf``.
        of: Name of the attack, for errors.

    Raises:
        ValueError: If it is neither L2 nor Linf.
    """
    match norm_of(value):
        case "l2":
            return "l2"
        case "linf":
            return "linf"
    raise ValueError(
        f"Expected the norm of {of} to be L2 or Linf, which are the norms of all reports, but got"
        f" {norm_of(value) or value!r}. Take an attack in L2 or Linf, or this one with such a norm."
    )


def check_norm(norm: Norm) -> None:
    """Raise a ValueError unless it is ``l2`` or ``linf``."""
    if norm not in get_args(Norm):
        raise ValueError(f"Expected `norm` to be one of {get_args(Norm)}, but got {norm!r}.")


def length(perturbation: Tensor, norm: Norm) -> Tensor:
    """Norm of each perturbation ``(B, ...)``: ``(B,)`` of its dtype."""
    order = 2 if norm == "l2" else torch.inf
    norms: Tensor = torch.linalg.vector_norm(perturbation.flatten(1), ord=order, dim=1)
    return norms


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Reshape values ``(B,)`` so that they scale images ``(B, ...)``."""
    return values.view(-1, *[1] * (images.dim() - 1))


def unit(perturbation: Tensor) -> Tensor:
    """Divide each perturbation by its L2 norm; zero stays zero."""
    return perturbation / per_image(length(perturbation, "l2").clamp(min=1e-20), perturbation)


def heading(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of steepest ascent in a norm: the unit gradient, or its sign."""
    return unit(gradient) if norm == "l2" else gradient.sign()


def into_ball(perturbation: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """Project perturbations ``(B, ...)`` onto balls around 0 of radius ``(B,)``."""
    radius = per_image(radius, perturbation)
    if norm == "linf":
        return torch.minimum(torch.maximum(perturbation, -radius), radius)
    size = per_image(length(perturbation, "l2").clamp(min=1e-20), perturbation)
    return perturbation * (radius / size).clamp(max=1.0)


def onto_sphere(perturbation: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """As `into_ball`, but lengthen perturbations inside an L2 ball to its radius; zero stays zero."""
    if norm == "linf":
        return into_ball(perturbation, radius, norm)
    return per_image(radius, perturbation) * unit(perturbation)
