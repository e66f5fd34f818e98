"""Training images that steer an attack: the nearest of each class in a layer."""

import torch
from torch import Tensor

from lightning_advknn.classifiers import DkNNClassifier
from lightning_advknn.search import MemoryBank


@torch.no_grad()
def nearest_of_each_class(bank: MemoryBank, features: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m nearest bank rows of every class, nearest first.

    Args:
        bank: Of one layer.
        features: That layer's raw activations, float32 ``(B, D)``.
        m: Rows of each class.

    Returns:
        Distances float64 ``(B, C, m)`` in the bank's metric, and bank rows int64 ``(B, C, m)``.

    Raises:
        ValueError: If a class has fewer than m rows.
    """
    distances, indices = [], []
    for label in range(bank.num_classes):
        own, rows = bank.of_class(label)
        if len(own) < m:
            raise ValueError(
                f"Expected at most {len(own)} guides (training images of class {label}), but got {m}."
            )
        near, found = own.search(features, m)
        distances.append(near)
        indices.append(rows[found])
    return torch.stack(distances, 1), torch.stack(indices, 1)


@torch.no_grad()
def features_of(victim: DkNNClassifier, images: Tensor, batch_size: int = 500) -> dict[str, Tensor]:
    """The victim's features of images, float32 ``(B, D)`` by layer, in batches."""
    parts = [victim.network.features(part) for part in torch.split(images, batch_size)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in victim.layers}
