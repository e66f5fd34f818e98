"""How many of the true neighbours an approximate backend finds."""

import torch
from torch import Tensor

from lightning_advknn.search.sharded import Bank

RECALL_QUERIES = 100
"""Images on which recall is measured."""


@torch.no_grad()
def recall(bank: Bank, queries: Tensor, k: int) -> Tensor:
    """Share of each query's true k nearest rows that a bank finds, float64 ``(B,)``; 1 if it is exact.

    Args:
        bank: With any backend; the truth is exact search in the same rows.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.

    Raises:
        ValueError: As `MemoryBank.search`, or if the bank's rows are spread over ranks.
    """
    (_, found), (_, true) = bank.search(queries, k), bank.as_exact().search(queries, k)
    return torch.stack([torch.isin(t, f).double().mean() for t, f in zip(true, found, strict=True)])
