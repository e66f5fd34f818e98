"""Attacks as users write them; configurations of cases name them by import path."""

from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn


def as_papers_do(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """A step along the gradient's sign, by code that expects a module."""
    model.eval()
    device = next(model.parameters()).device
    leaf = images.clone().to(device).requires_grad_()
    F.cross_entropy(model(leaf), labels.to(device)).backward()
    gradient = torch.zeros_like(images) if leaf.grad is None else leaf.grad
    return (images + eps * gradient.sign()).clamp(0, 1)


def of_colour(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """Another brightness for each of three channels: fails on grey images."""
    return (
        images + eps * torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, *images.shape[2:])
    ).clamp(0, 1)


class WithLabels(torchattacks.PGD):
    """Returns more than images."""

    def forward(self, images: Tensor, labels: Tensor) -> Any:
        """Adversarial images, and what they are of."""
        return super().forward(images, labels), labels
