"""What a scan finds: likely rows for each query, with bounds on their similarities."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """Likely rows for B queries, n for each, in no particular order."""

    lower: Tensor
    """Lower bounds of the similarities, float64 ``(B, n)``."""
    upper: Tensor
    """Upper bounds of the similarities, float64 ``(B, n)``."""
    indices: Tensor
    """Bank rows, int64 ``(B, n)``, distinct within a query."""
    unseen: Tensor
    """Upper bound of the similarity of every other row, float64 ``(B, 1)``."""

    def by_row(self) -> "Candidates":
        """The same candidates, in order of bank row."""
        indices, order = self.indices.sort(dim=1)
        return Candidates(self.lower.gather(1, order), self.upper.gather(1, order), indices, self.unseen)

    def without(self, rows: Tensor) -> "Candidates":
        """The same candidates, of which those of a mask, bool ``(B, n)``, are less similar than any row."""
        lower, upper = (bound.masked_fill(rows, -torch.inf) for bound in (self.lower, self.upper))
        return Candidates(lower, upper, self.indices, self.unseen)


class Scan(Protocol):
    """A first pass over a bank, which proposes candidates."""

    @property
    def precision(self) -> str:
        """Number format of its products."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def __call__(self, queries: Tensor, n: int) -> Candidates:
        """The n likeliest rows for queries, float32 ``(B, D)``; n is in [1, M]."""


def best_of(total: int, lower: Tensor, upper: Tensor, indices: Tensor) -> Candidates:
    """Candidates that are the n rows with the largest upper bounds.

    If a query has a bound that is not finite, arithmetic has overflowed: its candidates get infinite bounds.

    Args:
        total: Rows of the bank.
        lower: As in `Candidates`.
        upper: As in `Candidates`.
        indices: As in `Candidates`.
    """
    in_doubt = ~((upper - lower).abs() < torch.inf).all(1, keepdim=True)
    lower, upper = lower.masked_fill(in_doubt, -torch.inf), upper.masked_fill(in_doubt, torch.inf)
    unseen = upper.amin(1, keepdim=True)
    return Candidates(
        lower, upper, indices, unseen if indices.shape[1] < total else torch.full_like(unseen, -torch.inf)
    )
