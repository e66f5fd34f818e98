"""From candidates with bounds to the exact k nearest."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_advknn.search.scans.candidates import Candidates

PairBounds = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Lower and upper bounds, float64 ``(P,)``, for pairs: positions of queries and bank rows, int64 ``(P,)``."""


def refine(
    found: Candidates, labels: Tensor | None, k: int, bounded: PairBounds, exact: PairBounds
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest among candidates, and whether they are the k nearest of all rows.

    Candidates in doubt are compared in three rounds: by `bounded`, those that seem nearest; by `bounded`, all
    that could still be among the nearest; by `exact`, those that are left. If only labels matter and all
    candidates in doubt have one label, none of them is compared.

    Args:
        found: n candidates of each query, in order of bank row, so that ties go to the lowest.
        labels: Labels of the candidates, int64 ``(B, n)``, if only the labels of the nearest matter; None if
            their order does.
        k: Number of neighbours.
        bounded: Tight bounds, cheaply.
        exact: Bounds that are equal: the exact similarities.

    Returns:
        Similarities float64 ``(B, k)``, bank rows int64 ``(B, k)``, and bool ``(B,)``: whether no other
        row can be nearer.
    """
    lower, upper, indices, unseen = found.lower.clone(), found.upper.clone(), found.indices, found.unseen
    complete = unseen.isneginf()
    done = torch.zeros_like(lower, dtype=torch.bool)  # by `bounded`
    for compare, only_nearest in ((bounded, True), (bounded, False), (exact, False)):
        kth = _largest(lower, k)
        certain = (unseen < kth) | complete
        doubtful = (upper >= kth) & (lower < upper)
        if labels is not None:
            doubtful &= lower <= _largest(upper, k + 1)
            others = ~doubtful
            lowest = labels.masked_fill(others, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
            one_label = lowest >= labels.masked_fill(others, -1).amax(1, keepdim=True)
            # Without a finite k-th lower bound, rows that are left out cannot be told from the others.
            doubtful &= ~(certain & one_label & (kth > -torch.inf))
        # In the later rounds not those of uncertain queries, which are scanned again.
        chosen = doubtful & ((upper >= _largest(upper, k)) if only_nearest else certain)
        if compare is bounded:
            chosen &= ~done
            done |= chosen
        pairs = chosen.nonzero(as_tuple=True)  # a GPU waits here, and for little else
        if len(pairs[0]):
            lower[pairs], upper[pairs] = compare(pairs[0], indices[pairs])
        elif not doubtful.any():
            break
    kth = _largest(lower, k)
    certain = ((unseen < kth) | complete).squeeze(1)
    order = lower.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return lower.gather(1, order), indices.gather(1, order), certain


def _largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest value of each row, ``(B, 1)``; minus infinity if there are fewer."""
    if n > values.shape[1]:
        return torch.full_like(values[:, :1], -torch.inf)
    return values.topk(n).values[:, -1:]
