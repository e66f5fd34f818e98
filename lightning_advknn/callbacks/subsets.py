"""Small, fixed samples of images for the callback, drawn without the global random generator."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.data import Batch, ImageDataModule
from lightning_advknn.data.sample import fair_order
from lightning_advknn.data.splits import ImageSplit

_SEED = 0


class Subsets(NamedTuple):
    """Disjoint images for an evaluation, each in order of id."""

    attacked: ImageSplit
    calibration: ImageSplit
    bank: ImageSplit


def draw_subsets(
    data: ImageDataModule, testing: bool, num_images: int, num_calibration: int, bank_size: int | None
) -> Subsets:
    """Draw images with the class shares of their split; they are the same each time and on each rank.

    Args:
        data: The data set; the bank is drawn from ``train``.
        testing: Whether to attack images of ``test`` and calibrate with ``calibration``. Otherwise both are
            drawn from ``val``, so that no test image picks an epoch.
        num_images: Number of images to attack.
        num_calibration: Number of images for calibration.
        bank_size: Number of images in the bank; None for all training images.

    Raises:
        ValueError: If a split has too few images.
    """
    if testing:
        (attacked,) = _draw(data, "test", num_images=num_images)
        (calibration,) = _draw(data, "calibration", num_calibration=num_calibration)
    else:
        attacked, calibration = _draw(data, "val", num_images=num_images, num_calibration=num_calibration)
    rows = len(data.split("train")) if bank_size is None else bank_size
    (bank,) = _draw(data, "train", bank_size=rows)
    return Subsets(attacked, calibration, bank)


def read(split: ImageSplit, positions: Tensor, device: torch.device) -> Batch:
    """The images at these positions, int64 ``(n,)``, on a device."""
    images, labels, ids = split.on(device).__getitems__(positions.tolist())
    return Batch(images.to(device), labels.to(device), ids.to(device))


def batches(split: ImageSplit, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All images of a split in batches; unlike a DataLoader, this draws no global random number."""
    for positions in torch.split(torch.arange(len(split)), batch_size):
        yield read(split, positions, device)


def _draw(data: ImageDataModule, name: str, **sizes: int) -> list[ImageSplit]:
    split, total = data.split(name), sum(sizes.values())
    if total > len(split):
        raise ValueError(
            f"Expected {' + '.join(f'`{size}`' for size in sizes)} to be at most {len(split)} (images of"
            f" {data.name}'s split {name!r}), but got {total}. Use fewer."
        )
    order = fair_order(split.labels, _SEED)
    return [split.select(part) for part in torch.split(order[:total], list(sizes.values()))]
