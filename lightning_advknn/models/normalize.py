"""Normalisation as a layer of the network, so that images are in [0, 1] everywhere else."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean: Channel means of images in [0, 1].
        std: Channel standard deviations of the same images.

    Raises:
        ValueError: If the lengths differ, a standard deviation is not positive, or a value is not in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ValueError(
                f"Expected one `mean` and one positive `std` for each channel, but got {mean} and {std}."
            )
        if not all(0 <= value <= 1 for value in (*mean, *std)):
            raise ValueError(
                f"Expected `mean` and `std` in [0, 1], as of images in [0, 1], but got {list(mean)} and"
                f" {list(std)}. If they are of pixels in [0, 255], divide both by 255."
            )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], ``(B, channels, H, W)``, to zero mean and unit variance."""
        return (images - self.mean) / self.std
