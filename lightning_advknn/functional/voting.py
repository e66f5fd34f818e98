"""From neighbour labels to votes, distributions and predictions (Eq. 4, 8, 9, 11)."""

import torch
from torch import Tensor


def count_votes(neighbour_labels: Tensor, num_classes: int) -> Tensor:
    """Count how many of the k nearest neighbours (Eq. 11) carry each label.

    Args:
        neighbour_labels: Labels of the neighbours, int64 ``(B, k)``, in [0, C).
        num_classes: C.

    Returns:
        Votes, int64 ``(B, C)``; every row sums to k.

    >>> count_votes(torch.tensor([[2, 0, 2]]), 3)
    tensor([[1, 0, 2]])
    """
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
    return votes / votes.sum(-1, keepdim=True)


def knn_prediction(votes: Tensor) -> Tensor:
    """The class with most votes (Eq. 9); a tie goes to the lowest class id.

    Args:
        votes: int64 ``(..., C)``.

    Returns:
        int64 ``(...)``.

    >>> knn_prediction(torch.tensor([[1, 3, 3], [0, 0, 4]]))
    tensor([1, 2])
    """
    num_classes = votes.shape[-1]
    # `argmax` promises nothing on ties, so the rule is made part of the number: votes first, then low class id.
    tie_break = torch.arange(num_classes - 1, -1, -1, device=votes.device)
    return (votes * num_classes + tie_break).argmax(-1)


def dknn_prediction(votes: Tensor) -> Tensor:
    """DkNN's class: most votes summed over layers (Eq. 4); a tie goes to the lowest class id.

    Summing counts instead of probabilities is the same, since each layer has k votes, and is exact.

    Args:
        votes: int64 ``(B, L, C)``.

    Returns:
        int64 ``(B,)``.

    >>> dknn_prediction(torch.tensor([[[2, 1], [0, 3]]]))
    tensor([1])
    """
    return knn_prediction(votes.sum(1))
