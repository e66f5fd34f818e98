"""Digits that are installed with scikit-learn, so they need no download."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_advknn.data.base import ImageDataModule


class Digits(ImageDataModule):
    """Handwritten digits of scikit-learn: 1,797 images, enlarged from 8x8 to 1x28x28.

    They are the test images of UCI's "Optical Recognition of Handwritten Digits". 1,000 of them, drawn with
    `split_seed`, serve as training images.

    Args:
        batch_size: Batch size in training.
        eval_batch_size: Batch size everywhere else.
        val_size: Number of training images in ``val``.
        calibration_per_class: Number of test images of each class in ``calibration``.
        split_seed: Seed of the splits.
    """

    image_shape = (1, 28, 28)

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        val_size: int = 150,
        calibration_per_class: int = 25,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            download=False,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            calibration_per_class=calibration_per_class,
            split_seed=split_seed,
        )

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The training or test images, uint8 ``(n, 1, 28, 28)``, and labels, int64 ``(n,)``."""
        bunch = load_digits()
        small = torch.from_numpy(bunch.images)[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
        large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
        order = torch.randperm(len(large), generator=self._generator())
        chosen = order[:1000] if train else order[1000:]
        images = (large[chosen] * 255).round().to(torch.uint8)
        return images, torch.from_numpy(bunch.target).long()[chosen]
