"""How many of the true neighbours an approximate backend finds."""

from copy import copy

import torch
from torch import Tensor

from lightning_advknn.search.bank import MemoryBank


@torch.no_grad()
def recall(bank: "MemoryBank", queries: Tensor, k: int) -> Tensor:
    """Share of the true k nearest rows of each query that a bank finds, float64 ``(B,)``; 1 with an exact backend.

    Args:
        bank: With any backend; the truth is that of exact search in the same rows.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.

    Raises:
        ValueError: As `MemoryBank.search`.
    """
    exact = copy(bank)
    exact.backend, exact._scan = "float32", None  # which encodes nothing: there are few queries
    (_, found), (_, true) = bank.search(queries, k), exact.search(queries, k)
    return torch.stack([torch.isin(t, f).double().mean() for t, f in zip(true, found, strict=True)])
