"""Checks of images and labels."""

from typing import Any

import torch
from torch import Tensor

from lightning_advknn.functional.arithmetic import check_defaults


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless every pixel is finite and in [0, 1]; also calls `check_defaults`."""
    check_defaults()
    if not isinstance(images, Tensor):
        raise ValueError(
            f"Expected images as a float32 tensor (B, channels, H, W) in [0, 1], but got a {_kind(images)}."
            " Convert them with `torch.as_tensor(images, dtype=torch.float32)`."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Expected floating-point images in [0, 1], but got {images.dtype}. Divide uint8 by 255."
        )
    if images.is_meta:
        raise ValueError(
            "Expected images with values, but they are on the meta device. Create them on the CPU or a GPU."
        )
    if not images.numel():
        return
    low, high = torch.stack(images.aminmax()).tolist()  # both at once, as a GPU waits for each
    # NaN fails every comparison, so this catches it too.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Expected finite images in [0, 1], but got values in [{low}, {high}]."
            " Divide bytes by 255, clip rounding with `.clamp(0, 1)`, and leave normalisation to the network."
        )


def check_labels(labels: Tensor, n: int, num_classes: int | None = None) -> None:
    """Raise a ValueError unless labels are int64 ``(n,)``, at least 0, and below `num_classes` if given."""
    expected = f"Expected int64 `labels` of shape ({n},), one for each image, but got"
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{expected} a {_kind(labels)}. Convert them with `torch.as_tensor(labels, dtype=torch.int64)`."
        )
    if labels.dtype != torch.int64 or labels.shape != (n,):
        remedy = "Convert them with `.long()`, if they are whole numbers."
        if labels.shape == (n, 1):
            remedy = "Take `labels.squeeze(1).long()`."
        elif labels.ndim == 2 and len(labels) == n:
            remedy = "If they are one-hot, take `labels.argmax(1)`."
        elif labels.shape != (n,):
            remedy = "Pass one label for each image."
        raise ValueError(f"{expected} {labels.dtype} of shape {tuple(labels.shape)}. {remedy}")
    if not n:
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or (num_classes is not None and high >= num_classes):
        there = "at least 0" if num_classes is None else f"in [0, {num_classes - 1}] (the classes)"
        raise ValueError(f"Expected `labels` {there}, but got {low} to {high}. Classes count from 0.")


def _kind(value: Any) -> str:
    """Full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
