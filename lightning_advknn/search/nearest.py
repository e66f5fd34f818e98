"""The exact k nearest rows: scan, refine, and scan more widely where a row may have been missed."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.choices import Metric
from lightning_advknn.search.scans.candidates import Candidates, Scan
from lightning_advknn.search.scans.refine import refine
from lightning_advknn.search.scans.similarities import bounded_similarities, exact_similarities
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import Matrix

_CANDIDATES = {"cpu": 2**20, "cuda": 2**22}  # compared at once, over all queries
_MARGIN = (
    32  # candidates beyond k (3 k in low precision): enough for nearly every query, else the scan is widened
)


class Searchable(NamedTuple):
    """The rows that are searched, as `MemoryBank` holds them."""

    features: Matrix
    """float32 ``(M, D)``."""
    norms: Tensor
    """Euclidean norms of the features, float64 ``(M,)``."""
    labels: Tensor
    """int64 ``(M,)``."""
    ids: Tensor
    """Image ids, int64 ``(M,)``."""
    metric: Metric
    most_of_one: int
    """Largest number of rows that have one image id."""

    def candidates(self, k: int, leave_one_out: bool, precision: str) -> int:
        """Number of candidates to ask a scan of this precision for at first."""
        own = self.most_of_one if leave_one_out else 0
        return min(len(self.features), (k if precision == "float32" else 3 * k) + _MARGIN + own)


def nearest_rows(
    rows: Searchable,
    scan: Scan,
    queries: Tensor,
    k: int,
    own_ids: Tensor | None,
    in_order: bool,
    found: Candidates | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query.

    Args:
        rows: At least k, besides those with a query's own id.
        scan: Of these rows.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.
        own_ids: Image ids of the queries, int64 ``(B,)``, whose rows do not count; None if all rows count.
        in_order: Whether neighbours must be the nearest in order, or only their labels must be those of the
            nearest.
        found: What the first scan would find, if that is known.

    Returns:
        Similarities float64 ``(B, k)`` and bank rows int64 ``(B, k)``.
    """
    n = first = rows.candidates(k, own_ids is not None, scan.precision)
    similarities = queries.new_empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    todo, most = torch.arange(len(queries), device=queries.device), _CANDIDATES[queries.device.type]
    while len(todo):
        uncertain = []
        for some in torch.split(todo, len(todo) if found else max(1, most // n)):
            asked = queries if len(some) == len(queries) else queries[some]
            candidates = (found or scan(asked, n)).by_row()
            if own_ids is not None:
                candidates = candidates.without(rows.ids[candidates.indices] == own_ids[some, None])
            labels = None if in_order else rows.labels[candidates.indices]
            comparisons = partial(_bounded, rows, asked), partial(_exact, rows, asked)
            best, places, certain = refine(candidates, labels, k, *comparisons)
            # Also those that are uncertain, which are found again: to choose the others makes a GPU wait.
            similarities[some], indices[some] = best, places
            uncertain.append(some[~certain])
        todo = torch.cat(uncertain)
        if len(todo) and n > first and scan.precision != "float32":
            # Codes cannot tell so many near rows apart: all features are read, once.
            scan = TorchScan(rows.features, rows.norms, rows.metric, "float32")
            n = first = rows.candidates(k, own_ids is not None, scan.precision)
            continue
        n = n if found else min(len(rows.features), 8 * n)
        found = None
    return similarities, indices


def _bounded(
    rows: Searchable, queries: Tensor, query_rows: Tensor, bank_rows: Tensor
) -> tuple[Tensor, Tensor]:
    return bounded_similarities(queries, rows.features, rows.norms, rows.metric, query_rows, bank_rows)


def _exact(rows: Searchable, queries: Tensor, query_rows: Tensor, bank_rows: Tensor) -> tuple[Tensor, Tensor]:
    exact = exact_similarities(queries, rows.features, rows.metric, query_rows, bank_rows)
    return exact, exact
