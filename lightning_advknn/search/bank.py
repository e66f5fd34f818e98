"""`MemoryBank`: the stored training features, and exact search in them."""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_advknn.functional import count_votes
from lightning_advknn.search.scan import Candidates, Metric, inverse, torch_scan

if TYPE_CHECKING:
    from lightning_advknn.search.faiss_backend import FaissScan

Backend = Literal["torch", "faiss"]

_QUERIES_AT_ONCE = 512
_MARGIN = 32  # candidates beyond k: enough for nearly every query, else the scan is widened
_PAIR_ELEMENTS = 2**23  # float64 products held at once: 64 MiB


class MemoryBank(nn.Module):
    """Features of the training images with their labels, and their exact k nearest rows.

    Distances are those of float64 arithmetic on the stored float32 features, whatever the backend: it only
    proposes candidates, with an error bound (`search.scan`). Candidates that the bound leaves in doubt are compared in float64,
    and a query for which an unseen row could still enter the k nearest is scanned again more widely. Neighbours
    order by (distance, bank row), where cosine distances count to 12 decimals, so that rows which tie in exact
    arithmetic tie here, in whatever order their products are summed.

    Args:
        features: Raw activations, float32 ``(M, D)``.
        labels: int64 ``(M,)``, in [0, C).
        ids: Image ids, int64 ``(M,)``, by which a row can be kept from voting for itself.
        num_classes: C.
        metric: ``cosine``: 1 - cosine similarity (a zero vector has distance 1 to all). ``euclidean``: L2.
        backend: What scans the bank.

    Raises:
        ValueError: If shapes disagree, a feature is not finite, or metric or backend is unknown.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    norms: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        num_classes: int,
        metric: Metric = "cosine",
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        if features.ndim != 2 or not (len(features) == len(labels) == len(ids)) or not len(ids):
            raise ValueError(
                "Expected at least one row of features (M, D), labels (M,) and ids (M,), but got shapes"
                f" {tuple(features.shape)}, {tuple(labels.shape)} and {tuple(ids.shape)}."
            )
        for name, value, known in (
            ("metric", metric, get_args(Metric)),
            ("backend", backend, get_args(Backend)),
        ):
            if value not in known:
                raise ValueError(f"Expected `{name}` to be one of {known}, but got {value!r}.")
        if features.dtype != torch.float32:
            raise ValueError(
                f"Expected float32 features, but got {features.dtype}. Convert them with `.float()`."
            )
        check_backend(backend)
        norms = _norms(features)
        if not torch.isfinite(norms).all():
            raise ValueError(
                f"Expected finite features, but {(~torch.isfinite(norms)).sum().item()} of {len(norms)} rows hold"
                " NaN or infinity. Check the network's weights."
            )
        self.num_classes, self.metric, self.backend = num_classes, metric, backend
        self._faiss: FaissScan | None = None  # built at the first search
        # Not part of checkpoints: the bank is made again from the network and the training images.
        buffers = {"features": features, "labels": labels, "ids": ids, "norms": norms}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def __len__(self) -> int:
        return len(self.features)

    def check_k(self, k: int, leave_one_out: bool = False) -> None:
        """Raise a ValueError unless the bank has k rows to vote."""
        rows = len(self) - leave_one_out
        if not 1 <= k <= rows:
            less = " less the image's own" if leave_one_out else ""
            raise ValueError(f"Expected `k` to be in [1, {rows}] (the bank's rows{less}), but got {k}.")

    def search(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query (Eq. 10-11), nearest first.

        Args:
            queries: Raw activations, float32 ``(B, D)``.
            k: Number of neighbours.
            own_ids: Image ids of the queries, int64 ``(B,)``, whose rows do not count (leave-one-out).

        Returns:
            Distances float64 ``(B, k)`` and bank rows int64 ``(B, k)``.

        Raises:
            ValueError: If k exceeds the rows, or the queries have another width or are not finite.
        """
        scores, indices = self._nearest(queries, k, own_ids, in_order=True)
        return 1 - scores if self.metric == "cosine" else (-scores).sqrt(), indices

    def votes(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> Tensor:
        """Labels of the k nearest rows, counted: int64 ``(B, C)``. Arguments and errors as in `search`."""
        _, indices = self._nearest(queries, k, own_ids, in_order=False)
        return count_votes(self.labels[indices], self.num_classes)

    def _nearest(
        self, queries: Tensor, k: int, own_ids: Tensor | None, in_order: bool
    ) -> tuple[Tensor, Tensor]:
        self.check_k(k, leave_one_out=own_ids is not None)
        width = self.features.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width or queries.dtype != torch.float32:
            raise ValueError(
                f"Expected float32 queries of shape (B, {width}) as in the bank, but got {queries.dtype} of shape"
                f" {tuple(queries.shape)}."
            )
        if not torch.isfinite(queries).all():
            raise ValueError(
                "Expected finite query features, but got NaN or infinity. Check the images and the network's weights."
            )
        scores = queries.new_empty(len(queries), k, dtype=torch.float64)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        for chunk in torch.split(torch.arange(len(queries), device=queries.device), _QUERIES_AT_ONCE):
            own = None if own_ids is None else own_ids[chunk]
            scores[chunk], indices[chunk] = self._nearest_chunk(queries[chunk], k, own, in_order)
        return scores, indices

    def _nearest_chunk(
        self, queries: Tensor, k: int, own_ids: Tensor | None, in_order: bool
    ) -> tuple[Tensor, Tensor]:
        n = min(len(self), k + _MARGIN + (own_ids is not None))
        scores = queries.new_empty(len(queries), k, dtype=torch.float64)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        todo = torch.arange(len(queries), device=queries.device)
        while len(todo):
            found = self._scan(queries[todo], n)
            # A row that was not scanned scores at most this:
            unseen = found.scores.min(1, keepdim=True).values + found.error  # (B, 1)
            own = None if own_ids is None else own_ids[todo]
            best, rows, kth = self._rank(queries[todo], found, k, own, in_order)
            certain = (unseen < kth).squeeze(1) if n < len(self) else torch.ones_like(todo).bool()
            scores[todo[certain]], indices[todo[certain]] = best[certain], rows[certain]
            todo = todo[~certain]
            n = min(len(self), 8 * n)
        return scores, indices

    def _rank(
        self, queries: Tensor, found: Candidates, k: int, own_ids: Tensor | None, in_order: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exact scores and rows of the k best candidates, ``(B, k)``, and a lower bound of the k-th, ``(B, 1)``."""
        indices, by_row = found.indices.sort(dim=1)  # so that a stable sort breaks ties by bank row
        scores = found.scores.double().gather(1, by_row)  # (B, n)
        own = torch.zeros_like(scores, dtype=torch.bool)
        if own_ids is not None:
            own = self.ids[indices] == own_ids[:, None]
            scores = scores.masked_fill(own, -torch.inf)
        leading = scores.topk(min(k + 1, scores.shape[1])).values
        kth = leading[:, k - 1 : k] - found.error
        # Rows surely in or out of the k nearest need no exact score, unless their order is asked for.
        surely_in = torch.zeros_like(scores, dtype=torch.bool)
        if not in_order:
            if leading.shape[1] == k:
                leading = torch.nn.functional.pad(leading, (0, 1), value=-torch.inf)
            surely_in = scores - found.error > leading[:, k:] + found.error
        surely_out = (scores + found.error < kth) | own
        doubtful = (~surely_in & ~surely_out).nonzero()  # (P, 2)
        exact = torch.where(surely_in, torch.inf, -torch.inf).to(scores.dtype)
        exact[doubtful[:, 0], doubtful[:, 1]] = self._exact_scores(
            queries, doubtful[:, 0], indices[doubtful[:, 0], doubtful[:, 1]]
        )
        order = exact.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return exact.gather(1, order), indices.gather(1, order), kth

    def _exact_scores(self, queries: Tensor, query_rows: Tensor, bank_rows: Tensor) -> Tensor:
        """Similarities or minus squared distances of P (query, bank row) pairs in float64, ``(P,)``."""
        scores = queries.new_empty(len(query_rows), dtype=torch.float64)
        at_once = max(1, _PAIR_ELEMENTS // queries.shape[1])
        for pairs in torch.split(torch.arange(len(query_rows), device=queries.device), at_once):
            left = queries[query_rows[pairs]].double()
            right = self.features[bank_rows[pairs]].double()
            if self.metric == "cosine":
                lengths = torch.linalg.vector_norm(left, dim=1) * self.norms[bank_rows[pairs]]
                scores[pairs] = ((left * right).sum(1) * inverse(lengths)).round(decimals=12)
            else:
                scores[pairs] = -(left - right).square().sum(1)
        return scores

    def _scan(self, queries: Tensor, n: int) -> Candidates:
        if self.backend == "torch":
            return torch_scan(queries, self.features, self.norms, self.metric, n)
        if self._faiss is None:
            from lightning_advknn.search.faiss_backend import FaissScan

            self._faiss = FaissScan(self.features, self.norms, self.metric)
        found = self._faiss(queries, n)
        if (found.indices < 0).any():  # faiss gives no row where a float32 score overflows
            return torch_scan(queries, self.features, self.norms, self.metric, n)
        return found


def check_backend(backend: Backend) -> None:
    """Raise an ImportError unless what a backend needs is installed and works."""
    if backend == "faiss":
        from lightning_advknn.search.faiss_backend import import_faiss

        import_faiss()


def _norms(features: Tensor) -> Tensor:
    return torch.cat(
        [
            torch.linalg.vector_norm(part.double(), dim=1)
            for part in torch.split(features, max(1, _PAIR_ELEMENTS // features.shape[1]))
        ]
    )
