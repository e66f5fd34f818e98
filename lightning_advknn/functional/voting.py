"""Votes of neighbours, and the distributions and predictions made of them (Eq. 4, 8, 9, 11)."""

import torch
from torch import Tensor


def count_votes(neighbour_labels: Tensor, num_classes: int) -> Tensor:
    """Count how many of the k nearest neighbours (Eq. 11) have each label.

    Args:
        neighbour_labels: Integers ``(B, k)`` in [0, C).
        num_classes: C.

    Returns:
        Votes, int64 ``(B, C)``; every row sums to k.

    Raises:
        ValueError: If labels are not integers.

    >>> count_votes(torch.tensor([[2, 0, 2]]), 3)
    tensor([[1, 0, 2]])
    """
    neighbour_labels = _whole("neighbour_labels", neighbour_labels)
    votes = neighbour_labels.new_zeros(len(neighbour_labels), num_classes)
    return votes.scatter_add_(1, neighbour_labels, torch.ones_like(neighbour_labels))


def vote_distribution(votes: Tensor) -> Tensor:
    """The kNN's predicted distribution p(x) of Eq. (8): counts / k.

    Args:
        votes: int64 ``(..., C)`` with at least one vote a row.

    Returns:
        float32 ``(..., C)``; every row sums to one.

    >>> vote_distribution(torch.tensor([[1, 0, 3]]))
    tensor([[0.2500, 0.0000, 0.7500]])
    """
    return votes.float() / votes.sum(-1, keepdim=True).float()


def knn_prediction(votes: Tensor) -> Tensor:
    """The class with the most votes (Eq. 9); a tie goes to the lowest class id.

    Args:
        votes: Integers ``(..., C)``.

    Returns:
        int64 ``(...)``.

    Raises:
        ValueError: If votes are not integers.

    >>> knn_prediction(torch.tensor([[1, 3, 3], [0, 0, 4]]))
    tensor([1, 2])
    """
    votes = _whole("votes", votes)
    num_classes = votes.shape[-1]
    # `argmax` may return any class of a tie. So the class id is part of the number: the lowest id is largest.
    tie_break = torch.arange(num_classes - 1, -1, -1, device=votes.device)
    return (votes * num_classes + tie_break).argmax(-1)


def dknn_prediction(votes: Tensor) -> Tensor:
    """The class with the most votes summed over layers (Eq. 4); a tie goes to the lowest class id.

    Eq. (4) sums probabilities. Each layer has k votes, so summing the counts gives the same class, exactly.

    Args:
        votes: Integers ``(B, L, C)``.

    Returns:
        int64 ``(B,)``.

    Raises:
        ValueError: If votes are not integers or have another shape.

    >>> dknn_prediction(torch.tensor([[[2, 1], [0, 3]]]))
    tensor([1])
    """
    if votes.ndim != 3:
        raise ValueError(
            f"Expected votes of shape (B, L, C), but got {tuple(votes.shape)}. For one layer, pass"
            " `votes[:, None]`."
        )
    return knn_prediction(votes.sum(1))


def _whole(name: str, values: Tensor) -> Tensor:
    """Convert integers to int64, in which the tie rule cannot overflow; raise a ValueError for others."""
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"Expected `{name}` to be an int64 tensor, but got {got}. Convert it with `.long()`."
        )
    return values.long()
