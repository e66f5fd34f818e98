"""Small networks as users write them; configurations of cases name them by import path."""

import torch
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


class BatchNorm(Small):
    """Batch norm as it should be."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(8))


class TrainingBatchNorm(BatchNorm):
    """Batch norm that does not know the mode: it uses the batch's statistics and goes on counting."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        conv, norm = self.conv1[0], self.conv1[1]
        maps = F.batch_norm(conv(images), norm.running_mean, norm.running_var, training=True)
        logits: Tensor = self.fc(self.relu2(self.conv2(self.relu1(maps))).flatten(1))
        return logits


class MeanOfBatch(Small):
    """Scales images by the mean of them all instead of each one's own, as LPRNet's published code did its maps."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, which depend on the batch."""
        return super().forward(images / images.square().mean().sqrt())


class DropPath(Small):
    """Stochastic depth that is never switched off: now and then, a block is left out."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, sometimes other ones."""
        return super().forward(images if torch.rand(()) < 0.95 else 0 * images)


class Remembering(Small):
    """Subtracts a running mean of all images that it was ever asked about."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, which depend on earlier images."""
        self.seen.append(images.mean().detach())
        return super().forward(images - torch.stack(self.seen[-20:]).cumsum(0)[-1])


class CountsCalls(Small):
    """Counts how often it is asked, which changes nothing that it says."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        self.calls += 1
        return super().forward(images)
