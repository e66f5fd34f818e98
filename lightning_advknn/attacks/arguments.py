"""What every attack expects of its arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_advknn.functional import check_images


def check_arguments(images: Tensor, labels: Tensor, whole: Sequence[str] = (), **settings: float) -> None:
    """Raise a ValueError unless images are in [0, 1], each has a label, and settings are finite and at least 0.

    Args:
        images: float ``(B, ...)``.
        labels: int64 ``(B,)``.
        whole: Names of settings that must be whole numbers.
        settings: By name.
    """
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"Expected `{name}` to be finite and at least 0, but got {value}.")
        if name in whole and value != int(value):
            raise ValueError(f"Expected `{name}` to be a whole number, but got {value}.")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"Expected int64 `labels` of shape ({len(images)},), one an image,"
            f" but got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    check_images(images)


def check_at_least(least: int, **settings: float) -> None:
    """Raise a ValueError unless settings, by name, are at least this."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")


def check_positive(**settings: float) -> None:
    """Raise a ValueError unless settings, by name, are above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be above 0, but got {value}.")
