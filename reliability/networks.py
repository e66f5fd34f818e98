"""Small networks as users write them, right and wrong; configurations of cases name them by import path."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """A correct network of two convolutions and a linear layer, for 3x16x16 images.

    Args:
        num_classes: C.
        scale: Factor of the logits.
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
        """Logits ``(B, C)``, random."""
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
    """Correct batch norm."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(8))


class TrainingBatchNorm(BatchNorm):
    """Batch norm that ignores evaluation mode: it uses batch statistics and updates the running ones."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        conv, norm = self.conv1[0], self.conv1[1]
        maps = F.batch_norm(conv(images), norm.running_mean, norm.running_var, training=True)
        logits: Tensor = self.fc(self.relu2(self.conv2(self.relu1(maps))).flatten(1))
        return logits


class MeanOfBatch(Small):
    """Scales images by the mean of the whole batch, as LPRNet's published code does with its maps."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, which depend on the batch."""
        return super().forward(images / images.square().mean().sqrt())


class DropPath(Small):
    """Stochastic depth that is never switched off: a block is sometimes skipped."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, random."""
        return super().forward(images if torch.rand(()) < 0.95 else 0 * images)


class Remembering(Small):
    """Subtracts a sum over the images of earlier calls."""

    def __init__(self, num_classes: int = 4, scale: float = 1.0) -> None:
        super().__init__(num_classes, scale)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``, which depend on earlier images."""
        self.seen.append(images.mean().detach())
        return super().forward(images - torch.stack(self.seen[-20:]).cumsum(0)[-1])


class CountsCalls(Small):
    """Counts its calls, without effect on its outputs."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        self.calls += 1
        return super().forward(images)


class SetsDefaultDtype(Small):
    """Sets torch's default dtype in its constructor."""

    def __init__(self, num_classes: int = 4) -> None:
        torch.set_default_dtype(torch.float64)
        super().__init__(num_classes)
