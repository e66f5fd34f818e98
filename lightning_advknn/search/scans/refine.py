"""From candidates between bounds to the exact k nearest."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_advknn.search.scans.candidates import Candidates

Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Closer bounds, float64 ``(n,)`` each, of the similarities of n pairs: positions of queries and bank rows, int64 ``(n,)``."""


def settle(
    found: Candidates, labels: Tensor | None, k: int, bounded: Look, exact: Look
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest among candidates, and whether they are the k nearest of all.

    Candidates in doubt are looked at ever more closely: those that seem nearest, then all that could still be,
    then in float64. Where only labels matter, none need be looked at if all that are in doubt have the same.

    Args:
        found: n candidates of each query, by bank row, so that ties go to the lowest.
        labels: Theirs, int64 ``(B, n)``, if nothing else of the nearest is asked for; None if their order is.
        k: Number of neighbours.
        bounded: Looks closely.
        exact: Looks as closely as can be.

    Returns:
        Similarities float64 ``(B, k)``, bank rows int64 ``(B, k)``, and whether they are certain, bool ``(B,)``.
    """
    lower, upper, indices, unseen = found.lower.clone(), found.upper.clone(), found.indices, found.unseen
    complete = unseen.isneginf()
    seen = torch.zeros_like(lower, dtype=torch.bool)  # by `bounded`
    for look, only_nearest in ((bounded, True), (bounded, False), (exact, False)):
        kth = _largest(lower, k)
        certain = (unseen < kth) | complete
        doubtful = (upper >= kth) & (lower < upper)
        if labels is not None:
            doubtful &= lower <= _largest(upper, k + 1)
            lowest = labels.where(doubtful, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            one_label = lowest >= labels.where(doubtful, -1).amax(1, keepdim=True)
            # Of rows without a lower bound, those that do not count look like the others.
            doubtful &= ~(certain & one_label & (kth > -torch.inf))
        if not doubtful.any():
            break
        if only_nearest:
            doubtful &= upper >= _largest(upper, k)
        else:
            doubtful &= certain  # the others are scanned again
        if look is bounded:
            doubtful &= ~seen
            seen |= doubtful
        pairs = doubtful.nonzero(as_tuple=True)
        if len(pairs[0]):
            lower[pairs], upper[pairs] = look(pairs[0], indices[pairs])
    kth = _largest(lower, k)
    certain = ((unseen < kth) | complete).squeeze(1)
    order = lower.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return lower.gather(1, order), indices.gather(1, order), certain


def _largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of each row, ``(B, 1)``; less than any if there are fewer."""
    if n > values.shape[1]:
        return torch.full_like(values[:, :1], -torch.inf)
    return values.topk(n).values[:, -1:]
