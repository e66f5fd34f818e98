"""Training images that steer an attack: the nearest of each class in a layer."""

import torch
from torch import Tensor

from lightning_advknn.classifiers import DkNN
from lightning_advknn.search import Bank


@torch.no_grad()
def _nearest_of_each_class(bank: Bank, features: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Find the m nearest bank rows of every class, nearest first.

    Args:
        bank: Bank of a layer.
        features: Raw activations of the layer, float32 ``(B, D)``.
        m: Number of rows of each class.

    Returns:
        Distances float64 ``(B, C, m)`` in the bank's metric, and bank rows int64 ``(B, C, m)``.

    Raises:
        ValueError: If a class has fewer than m rows.
    """
    found = [_nearest_of_class(bank, features, label, m) for label in range(bank.num_classes)]
    distances, rows = zip(*found, strict=True)
    return torch.stack(distances, 1), torch.stack(rows, 1)


@torch.no_grad()
def _nearest_of_class(bank: Bank, features: Tensor, label: int, m: int) -> tuple[Tensor, Tensor]:
    """Find the m nearest bank rows of one class: distances ``(B, m)`` and bank rows ``(B, m)``.

    It uses float32 products and is many times faster than the exact search. Rows whose distances differ by
    rounding may be swapped, which does not matter to an attack.
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
    # Stable, so that copies keep the order of the bank.
    nearest, order = distances.sort(dim=1, stable=True)
    return nearest[:, :m], rows[order[:, :m]]


def nearest_in_each_layer(
    victim: DkNN, images: Tensor, m: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find the m nearest training images of every class in each layer, nearest first.

    Args:
        victim: Its banks hold the training images.
        images: float32 ``(B, ...)``.
        m: Number of training images of each class.

    Returns:
        By layer, squared distances as in `Guides`, float64 ``(B, C, m)``, and bank rows, int64 ``(B, C, m)``.

    Raises:
        ValueError: If a class has fewer than m rows.
    """
    squares, rows = {}, {}
    for layer, features in victim.features(images).items():
        bank = victim.banks[layer]
        distances, rows[layer] = _nearest_of_each_class(bank, features, m)
        squares[layer] = as_lengths(bank, distances).square()
    return squares, rows


def as_lengths(bank: Bank, distances: Tensor) -> Tensor:
    """Convert distances of a bank to Euclidean ones; for cosine distances, between unit vectors."""
    return (2 * distances).clamp(min=0).sqrt() if bank.metric == "cosine" else distances


def nearest_wrong_class(bank: Bank, features: Tensor, labels: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Find the wrong class whose m nearest rows have the smallest mean distance.

    Args:
        bank: Bank of a layer.
        features: Features of that layer, float32 ``(B, D)``.
        labels: Own classes, int64 ``(B,)``.
        m: Number of rows of each class.

    Returns:
        The classes, int64 ``(B,)``, and their m nearest rows, nearest first, int64 ``(B, m)``.

    Raises:
        ValueError: If a class has fewer than m rows.
    """
    distances, rows = _nearest_of_each_class(bank, features, m)  # (B, C, m)
    own = labels[:, None] == torch.arange(bank.num_classes, device=labels.device)
    wrong = as_lengths(bank, distances).mean(2).masked_fill(own, torch.inf).argmin(1)
    return wrong, rows[torch.arange(len(labels), device=labels.device), wrong]


def nearest_of_classes(bank: Bank, features: Tensor, classes: Tensor, m: int) -> Tensor:
    """Find the m nearest rows of a given class for each image, nearest first, int64 ``(B, m)``."""
    rows = torch.empty(len(features), m, dtype=torch.int64, device=features.device)
    for label in torch.unique(classes).tolist():
        some = classes == label
        rows[some] = _nearest_of_class(bank, features[some], label, m)[1]
    return rows
