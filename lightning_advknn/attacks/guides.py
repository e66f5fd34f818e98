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
    found = [nearest_of_class(bank, features, label, m) for label in range(bank.num_classes)]
    distances, rows = zip(*found, strict=True)
    return torch.stack(distances, 1), torch.stack(rows, 1)


@torch.no_grad()
def nearest_of_class(bank: MemoryBank, features: Tensor, label: int, m: int) -> tuple[Tensor, Tensor]:
    """The same of one class: distances ``(B, m)`` and bank rows ``(B, m)``.

    From float32 products, which is many times faster than the exact search: rows that are as far but for rounding may
    change places, which is nothing to an attack.
    """
    rows = (bank.labels == label).nonzero().squeeze(1)
    if len(rows) < m:
        raise ValueError(
            f"Expected at most {len(rows)} guides (training images of class {label}), but got {m}."
        )
    products = (features @ bank.features[rows].T).double()  # (B, n)
    lengths, own = bank.norms[rows], torch.linalg.vector_norm(features.double(), dim=1, keepdim=True)
    if bank.metric == "cosine":
        distances = 1 - products / (own * lengths).clamp(min=torch.finfo(torch.float32).tiny)
    else:
        distances = (own**2 + lengths**2 - 2 * products).clamp(min=0).sqrt()
    # Stable, so that copies stay in the bank's order.
    nearest, order = distances.sort(dim=1, stable=True)
    return nearest[:, :m], rows[order[:, :m]]


@torch.no_grad()
def features_of(victim: DkNNClassifier, images: Tensor, batch_size: int = 500) -> dict[str, Tensor]:
    """The victim's features of images, float32 ``(B, D)`` by layer, in batches."""
    parts = [victim.network.features(part) for part in torch.split(images, batch_size)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in victim.layers}
