"""What every attack expects of its arguments."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from lightning_advknn.classifiers import DkNNClassifier
from lightning_advknn.functional import autocast_devices, check_images, check_labels


def check_arguments(
    images: Tensor,
    labels: Tensor,
    whole: Sequence[str] = (),
    victim: DkNNClassifier | None = None,
    **settings: float,
) -> None:
    """Raise a ValueError unless images are in [0, 1], each has a label, and settings are finite and at least 0.

    Also under autocast, in whose arithmetic a victim's features would be others; an attack's `precision` is for that.

    Args:
        images: float ``(B, ...)``.
        labels: int64 ``(B,)``.
        whole: Names of settings that must be whole numbers.
        victim: Whose images and classes they must be.
        settings: By name.
    """
    for name, value in settings.items():
        if not _is_number(value):
            raise ValueError(f"Expected `{name}` to be one number, but got {value!r}.")
        if not 0 <= value < float("inf"):
            raise ValueError(f"Expected `{name}` to be finite and at least 0, but got {value}.")
        if name in whole and value != int(value):
            raise ValueError(f"Expected `{name}` to be a whole number, but got {value}.")
    if victim is None:
        check_images(images)
    else:
        victim.check_images(images)
    check_labels(labels, len(images), None if victim is None else victim.num_classes)
    if autocast := autocast_devices():
        raise ValueError(
            f"Expected an attack outside of autocast, but it is on for {', '.join(autocast)}. Call it within"
            f" `torch.autocast({autocast[0]!r}, enabled=False)`; for gradients in bfloat16 there is `precision` of AttackSettings."
        )


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


def check_returned(name: str, adversarial: object, images: Tensor) -> None:
    """Raise a ValueError unless an attack returned images.

    Args:
        name: Of the attack.
        adversarial: What it returned: a floating-point tensor of the images' shape is right.
        images: What it was given, ``(B, channels, H, W)``.
    """
    wanted = f"Expected {name} to return a floating-point tensor of shape {tuple(images.shape)}, but got"
    if not isinstance(adversarial, Tensor):
        kind = f"{type(adversarial).__module__}.".removeprefix("builtins.") + type(adversarial).__qualname__
        raise ValueError(f"{wanted} a {kind}. Return the adversarial images alone, as a torch.Tensor.")
    if adversarial.shape != images.shape:
        raise ValueError(f"{wanted} shape {tuple(adversarial.shape)}. Return one image for each image.")
    if not adversarial.is_floating_point():
        raise ValueError(f"{wanted} {adversarial.dtype}. Return images in [0, 1]: divide bytes by 255.")


def _is_number(value: object) -> bool:
    """Python's and NumPy's numbers, and tensors of one; no bool."""
    if isinstance(value, Tensor):
        return not value.ndim and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)
