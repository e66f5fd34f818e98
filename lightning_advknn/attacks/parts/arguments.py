"""Types and checks of the arguments of attacks, and of their results."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import autocast_devices, check_images, check_labels

LogitsFn = Callable[[Tensor], Tensor]
"""Maps images ``(B, ...)`` to logits ``(B, C)``; the gradient is autograd's."""

Target = LogitsFn | DkNN
"""The target of an attack: a logits function or a victim. A kNN is a DkNN of one layer."""

Attack = Callable[[Any, Tensor, Tensor], Tensor]
"""An attack with its settings bound: ``attack(target, images, labels) -> adversarial``."""

_ROUNDING = 1e-6  # rounding in float32 may leave [0, 1] by this much


def check_arguments(
    images: Tensor,
    labels: Tensor,
    whole: Sequence[str] = (),
    victim: DkNN | None = None,
    **settings: float,
) -> None:
    """Check the arguments of an attack.

    Args:
        images: float ``(B, ...)``.
        labels: int64 ``(B,)``.
        whole: Names of settings that must be integers.
        victim: Victim that images and labels must fit; None for none.
        settings: Numbers by name.

    Raises:
        NotFittedError: If the victim is not fitted.
        ValueError: If images are not in [0, 1], an image has no label, a setting is not finite or below 0, or
            autocast is on, which would change a victim's features; an attack has `precision` for this.
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
            f" `torch.autocast({autocast[0]!r}, enabled=False)`; for gradients in bfloat16, use `precision`"
            " of AttackSettings."
        )


def check_at_least(least: int, **settings: float) -> None:
    """Raise a ValueError unless all settings are at least this."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")


def check_positive(**settings: float) -> None:
    """Raise a ValueError unless all settings are above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be above 0, but got {value}.")


def check_returned(name: str, adversarial: object, images: Tensor) -> None:
    """Raise a ValueError unless an attack returned images.

    Args:
        name: Name of the attack.
        adversarial: Its result, which must be a floating-point tensor of the images' shape.
        images: Its input ``(B, channels, H, W)``.
    """
    wanted = f"Expected {name} to return a floating-point tensor of shape {tuple(images.shape)}, but got"
    if not isinstance(adversarial, Tensor):
        kind = f"{type(adversarial).__module__}.".removeprefix("builtins.") + type(adversarial).__qualname__
        raise ValueError(f"{wanted} a {kind}. Return the adversarial images alone, as a torch.Tensor.")
    if adversarial.shape != images.shape:
        raise ValueError(f"{wanted} shape {tuple(adversarial.shape)}. Return one image for each image.")
    if not adversarial.is_floating_point():
        raise ValueError(f"{wanted} {adversarial.dtype}. Return images in [0, 1]: divide bytes by 255.")
    if adversarial.is_meta:
        raise ValueError(
            f"{wanted} one on the device meta, which has no values. Return one on {images.device}."
        )


def returned_images(name: str, returned: object, images: Tensor) -> Tensor:
    """Check the result of an attack and copy it, with the images' dtype and device, clipped to [0, 1].

    Args:
        name: Name of the attack.
        returned: A floating-point tensor of the images' shape, in [0, 1] up to rounding.
        images: Its input, float ``(B, channels, H, W)``.

    Raises:
        ValueError: If the result is anything else.
    """
    check_returned(name, returned, images)
    # A copy, because an attack may return the same memory each time.
    adversarial = cast(Tensor, returned).detach().to_dense().to(images, copy=True)
    if not len(adversarial):
        return adversarial
    low, high = adversarial.aminmax()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails every comparison
        raise ValueError(
            f"Expected {name} to return finite images in [0, 1], but got values in"
            f" [{low.item()}, {high.item()}]. Clip them with `adversarial.clamp(0, 1)`; for a library's"
            " attack, change its settings. NaN often comes from the division by a gradient of zero."
        )
    return adversarial.clamp_(0.0, 1.0)


def _is_number(value: object) -> bool:
    """Whether it is a number of Python, NumPy or a tensor of one element; bool is not."""
    if isinstance(value, Tensor):
        return not value.ndim and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)
