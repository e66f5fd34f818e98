"""Small networks as users write them; configurations of cases name them by import path."""

import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """Two convolutions and a linear layer on 3x16x16 images, as it should be.

    Args:
        num_classes: C.
        scale: Of the logits.
    """

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(16 * 16, num_classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        maps = self.relu1(self.conv1(images))
        maps = self.relu2(self.conv2(maps))
        logits: Tensor = self.scale * self.fc(maps.flatten(1))
        return logits


class DropoutAlways(Small):
    """Dropout without ``training=self.training``."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, other ones at each call."""
        return super().forward(F.dropout(images, 0.5))


class BatchStatistics(Small):
    """Batch norm without running statistics: an image's logits depend on its batch."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(8, track_running_stats=False))


class SharedReLU(Small):
    """One ReLU at two places: layer ``relu1`` runs twice."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.relu2 = self.relu1
