"""What a scan finds: likely rows of each query, with bounds on their similarities."""

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What a scan found, for B queries and n candidates each, in no particular order."""

    lower: Tensor
    """No candidate is less similar than this, float64 ``(B, n)``."""
    upper: Tensor
    """No candidate is more similar than this, float64 ``(B, n)``."""
    indices: Tensor
    """Bank rows, int64 ``(B, n)``, distinct within a query."""
    unseen: Tensor
    """No other row is more similar than this, float64 ``(B, 1)``."""

    def by_row(self) -> "Candidates":
        """The same in order of bank row."""
        indices, order = self.indices.sort(dim=1)
        return Candidates(self.lower.gather(1, order), self.upper.gather(1, order), indices, self.unseen)

    def without(self, rows: Tensor) -> "Candidates":
        """With some of them, bool ``(B, n)``, less similar than anything."""
        lower, upper = (bound.masked_fill(rows, -torch.inf) for bound in (self.lower, self.upper))
        return Candidates(lower, upper, self.indices, self.unseen)


def best_of(total: int, lower: Tensor, upper: Tensor, indices: Tensor) -> Candidates:
    """The best candidates by upper bound of a bank of so many rows, with bounds ``(B, n)`` as in `Candidates`.

    Where a bound is not finite, arithmetic has overflowed: the query is all in doubt.
    """
    in_doubt = ~torch.isfinite(lower - upper).all(1, keepdim=True)
    lower, upper = lower.masked_fill(in_doubt, -torch.inf), upper.masked_fill(in_doubt, torch.inf)
    unseen = upper.amin(1, keepdim=True)
    return Candidates(
        lower, upper, indices, unseen if indices.shape[1] < total else torch.full_like(unseen, -torch.inf)
    )
