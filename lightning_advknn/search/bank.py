"""`MemoryBank`: the stored training features, and exact search in them."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn.choices import Backend, Metric
from lightning_advknn.functional import check_defaults, check_labels, count_votes, whole
from lightning_advknn.search.index_settings import APPROXIMATE, index_settings
from lightning_advknn.search.scans.candidates import Candidates
from lightning_advknn.search.scans.quantize import WIDEST, check_int8, fastest, lengths
from lightning_advknn.search.scans.refine import settle
from lightning_advknn.search.scans.rounding import inverse
from lightning_advknn.search.scans.self_scan import candidates_of_all
from lightning_advknn.search.scans.similarities import bounded_similarities, exact_similarities
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import Rows, StoredRows

if TYPE_CHECKING:
    from lightning_advknn.search.scans.faiss_scan import ApproximateScan, FaissScan


_AT_ONCE = {"cpu": 512, "cuda": 4096, "disk": 2048}  # queries
_CANDIDATES = 2**20  # looked at together, over all queries
_MARGIN = 32  # candidates beyond k, or 3 k in low precision: enough for nearly every query, else the scan is widened


class MemoryBank(nn.Module):
    """Features of the training images with their labels, and their exact k nearest rows (unless the backend is approximate).

    Distances are those of float64 arithmetic on the stored float32 features, whatever the backend: it only
    proposes candidates, between rigorous bounds (`search.scan`). Candidates that the bounds leave in doubt are compared
    more closely, at last in float64, and a query for which an unseen row could still enter the k nearest is scanned again
    more widely. Neighbours order by (distance, bank row), where cosine distances count to 12 decimals, so that rows
    which tie in exact arithmetic tie here, however their products are rounded (unless within some 1e-15 of the edge
    between two decimals). Copies of a row always tie.

    Args:
        features: Raw activations, float32 ``(M, D)``, in memory or in a file.
        labels: int64 ``(M,)``, in [0, C).
        ids: Image ids, int64 ``(M,)``, by which a row can be kept from voting for itself.
        num_classes: C.
        metric: ``cosine``: 1 - cosine similarity (a zero vector has distance 1 to all). ``euclidean``: L2.
        backend: What scans the bank: matrix products in some precision, ``auto`` in the one that the kind of
            device is fastest in (`codes.fastest`), or faiss. No neighbour depends on it, but that ``ivf`` and
            ``hnsw`` are approximate: neighbours are the nearest of those that faiss proposes (`search.recall`
            says how many it misses).
        index: Settings of an approximate backend that differ from its defaults (`approximate.index_settings`).

    Raises:
        ValueError: If shapes disagree, a label is no class or not int64, a feature is not finite, the metric
            is unknown, or the backend cannot search such features. At the first search: if ``int8`` products
            overflow on the device.
    """

    image_shape: tuple[int, ...] | None = None
    """Of the images whose features these are, where `classifiers.build_banks` has stored them."""

    features: Rows
    labels: Tensor
    ids: Tensor
    norms: Tensor

    def __init__(
        self,
        features: Rows,
        labels: Tensor,
        ids: Tensor,
        num_classes: int,
        metric: Metric = "cosine",
        backend: Backend = "auto",
        index: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        _check(features, labels, ids, num_classes, metric)
        check_backend(backend, features.shape[1], isinstance(features, Tensor))
        index_settings(backend, len(features), index)
        norms = lengths(features)
        if not torch.isfinite(norms).all():
            raise ValueError(
                f"Expected finite features, but {(~torch.isfinite(norms)).sum().item()} of {len(norms)} rows hold"
                " NaN or infinity. Check the network's weights."
            )
        self.num_classes, self.metric, self.backend, self.index = num_classes, metric, backend, index
        self._most_of_one = int(torch.unique(ids, return_counts=True)[1].max())  # rows of one image
        self._scan: TorchScan | FaissScan | ApproximateScan | None = None  # made at the first search
        # Not part of checkpoints: the bank is made again from the network and the training images.
        buffers = {"labels": labels, "ids": ids, "norms": norms}
        if isinstance(features, Tensor):
            buffers["features"] = features
        else:
            self.features = features
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def __len__(self) -> int:
        return len(self.features)

    def of_class(self, label: int) -> tuple["MemoryBank", Tensor]:
        """A bank of one class's rows alone, and which rows they are, int64 ``(n,)``.

        Raises:
            ValueError: If there are none.
        """
        rows = (self.labels == label).nonzero().squeeze(1)
        if not len(rows):
            there = sorted(set(self.labels.tolist()))
            raise ValueError(f"Expected the label of a class with rows, one of {there}, but got {label}.")
        kept = self.features[rows], self.labels[rows], self.ids[rows]
        backend: Backend = "auto" if self.backend in APPROXIMATE else self.backend  # few rows need no index
        return MemoryBank(*kept, self.num_classes, self.metric, backend), rows

    def check_k(self, k: int, leave_one_out: bool = False) -> None:
        """Raise a ValueError unless k is a whole number and the bank has k rows to vote."""
        k = whole("k", k)
        rows = len(self) - (self._most_of_one if leave_one_out else 0)
        if not 1 <= k <= rows:
            less = " less the image's own" if leave_one_out else ""
            raise ValueError(f"Expected `k` to be in [1, {rows}] (the bank's rows{less}), but got {k}.")

    def check_queries(self, queries: Tensor) -> None:
        """Raise a ValueError unless queries are finite features of the bank's width, float32 ``(B, D)``."""
        check_defaults()
        if not isinstance(queries, Tensor):
            raise ValueError(
                f"Expected queries as a float32 tensor, but got a {type(queries).__name__}. Convert them with"
                " `torch.as_tensor(queries, dtype=torch.float32)`."
            )
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

    @torch.no_grad()
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
        similarities, indices = self._nearest(queries, k, own_ids, in_order=True)
        return 1 - similarities if self.metric == "cosine" else (-similarities).sqrt(), indices

    @torch.no_grad()
    def votes(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> Tensor:
        """Labels of the k nearest rows, counted: int64 ``(B, C)``. Arguments and errors as in `search`."""
        _, indices = self._nearest(queries, k, own_ids, in_order=False)
        return count_votes(self.labels[indices], self.num_classes)

    @torch.no_grad()
    def nearby(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n nearest rows or nearly so, most similar first: much cheaper than `search`, for what only seeks a direction.

        Similarities are those of the scan: off by what its precision loses, so neighbours close to the n-th may be missing
        and close ones may be in another order.

        Args:
            queries: Raw activations, float32 ``(B, D)``.
            n: Number of rows.

        Returns:
            Similarities float64 ``(B, n)``, which are cosines or minus squared distances, and bank rows int64 ``(B, n)``.

        Raises:
            ValueError: If n exceeds the rows, or the queries have another width or are not finite.
        """
        self.check_k(n)
        self.check_queries(queries)
        similarities, indices = [], []
        for chunk in torch.split(queries, self._at_once):
            found = self._scanner()(chunk, n)
            middle = ((found.lower + found.upper) / 2).nan_to_num(0.0)  # where arithmetic overflowed
            middle, order = middle.sort(dim=1, descending=True, stable=True)
            similarities.append(middle)
            indices.append(found.indices.gather(1, order))
        return torch.cat(similarities), torch.cat(indices)

    @torch.no_grad()
    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of bank rows, of unit length where the metric is cosine.

        Args:
            rows: int64 ``(B, n)``.
            weights: float64 ``(B, n)``.

        Returns:
            float32 ``(B, D)``.
        """
        if self.metric == "cosine":
            weights = weights * inverse(self.norms)[rows]
        weights = weights.to(torch.float32)
        if isinstance(self.features, Tensor):  # read where they lie
            return F.embedding_bag(rows, self.features, mode="sum", per_sample_weights=weights)
        sums = torch.empty(len(rows), self.features.shape[1], device=rows.device)
        for i, each in enumerate(rows):
            sums[i] = weights[i] @ self.features[each]
        return sums

    @torch.no_grad()
    def leave_one_out_votes(self, k: int) -> Tensor:
        """Votes on each of the bank's own rows without itself, int64 ``(M, C)``; as ``votes(features, k, ids)``, but faster.

        Raises:
            ValueError: If k exceeds the other rows.
        """
        self.check_k(k, leave_one_out=True)
        at_once = self._at_once
        scan = self._scanner()
        n = self._candidates(k, True, scan.precision)
        votes = torch.empty(len(self), self.num_classes, dtype=torch.int64, device=self.labels.device)
        found: Iterator[Candidates | None] = repeat(None)
        if isinstance(scan, TorchScan) and scan.symmetric and 2 * n < len(self):
            found = candidates_of_all(scan, self.norms, n, at_once)
        starts = range(0, len(self), at_once)
        for start in tqdm(starts, desc="leave-one-out votes", disable=None, leave=False):
            rows = slice(start, start + at_once)
            _, indices = self._nearest_chunk(
                self.features[rows], k, self.ids[rows], in_order=False, found=next(found)
            )
            votes[rows] = count_votes(self.labels[indices], self.num_classes)
        return votes

    def _nearest(
        self, queries: Tensor, k: int, own_ids: Tensor | None, in_order: bool
    ) -> tuple[Tensor, Tensor]:
        self.check_k(k, leave_one_out=own_ids is not None)
        self.check_queries(queries)
        if own_ids is not None and own_ids.shape != (len(queries),):
            raise ValueError(
                f"Expected `own_ids` of shape ({len(queries)},), one a query, but got {tuple(own_ids.shape)}."
            )
        similarities = queries.new_empty(len(queries), k, dtype=torch.float64)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        at_once = self._at_once
        starts = range(0, len(queries), at_once)
        for start in tqdm(starts, desc="search", disable=None if len(starts) > 8 else True, leave=False):
            chunk = slice(start, start + at_once)
            own = None if own_ids is None else own_ids[chunk]
            similarities[chunk], indices[chunk] = self._nearest_chunk(queries[chunk], k, own, in_order)
        return similarities, indices

    @property
    def _at_once(self) -> int:
        return _AT_ONCE[self.labels.device.type if isinstance(self.features, Tensor) else "disk"]

    def _nearest_chunk(
        self,
        queries: Tensor,
        k: int,
        own_ids: Tensor | None,
        in_order: bool,
        found: Candidates | None = None,
    ) -> tuple[Tensor, Tensor]:
        scan = self._scanner()
        n = first = self._candidates(k, own_ids is not None, scan.precision)
        similarities = queries.new_empty(len(queries), k, dtype=torch.float64)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        todo = torch.arange(len(queries), device=queries.device)
        while len(todo):
            at_once = len(todo) if found else max(1, _CANDIDATES // n)
            left = []
            for some in torch.split(todo, at_once):
                own = None if own_ids is None else own_ids[some]
                candidates = (found or scan(queries[some], n)).by_row()
                if own is not None:
                    candidates = candidates.without(self.ids[candidates.indices] == own[:, None])
                looks = partial(self._bounded, queries[some]), partial(self._exact, queries[some])
                labels = self.labels[candidates.indices]
                best, rows, certain = settle(candidates, None if in_order else labels, k, *looks)
                similarities[some[certain]], indices[some[certain]] = best[certain], rows[certain]
                left.append(some[~certain])
            todo = torch.cat(left)
            if len(todo) and n > first and scan.precision != "float32":
                # Too many rows are too near to each other for codes to tell: all features are read, once.
                scan = TorchScan(self.features, self.norms, self.metric, "float32")
                n = first = self._candidates(k, own_ids is not None, scan.precision)
                continue
            n = n if found else min(len(self), 8 * n)
            found = None
        return similarities, indices

    def _candidates(self, k: int, leave_one_out: bool, precision: str) -> int:
        own = self._most_of_one if leave_one_out else 0
        return min(len(self), (k if precision == "float32" else 3 * k) + _MARGIN + own)

    def _bounded(self, queries: Tensor, query_rows: Tensor, bank_rows: Tensor) -> tuple[Tensor, Tensor]:
        return bounded_similarities(queries, self.features, self.norms, self.metric, query_rows, bank_rows)

    def _exact(self, queries: Tensor, query_rows: Tensor, bank_rows: Tensor) -> tuple[Tensor, Tensor]:
        exact = exact_similarities(queries, self.features, self.metric, query_rows, bank_rows)
        return exact, exact

    def _scanner(self) -> "TorchScan | FaissScan | ApproximateScan":
        """Made at the first search, and again once the bank has moved to another device."""
        if self._scan is None or self._scan.device != self.features.device:
            if self.backend == "faiss":
                from lightning_advknn.search.scans.faiss_scan import FaissScan

                self._scan = FaissScan(self.features[:], self.norms, self.metric)
            elif self.backend == "ivf" or self.backend == "hnsw":
                from lightning_advknn.search.scans.faiss_scan import ApproximateScan

                self._scan = ApproximateScan(self.features, self.norms, self.metric, self.backend, self.index)
            else:
                automatic = fastest(self.features.device, self.features.shape[1])
                precision = automatic if self.backend == "auto" else self.backend
                if precision == "int8":
                    check_int8(self.features.device)
                self._scan = TorchScan(self.features, self.norms, self.metric, precision)
        return self._scan


def check_backend(backend: Backend, width: int = 1, in_memory: bool = True) -> None:
    """Raise unless a backend can search features of this width, in memory or on disk.

    Raises:
        ImportError: If what it needs is not installed or does not work.
        ValueError: If it is unknown or not made for such features.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"Expected `backend` to be one of {get_args(Backend)}, but got {backend!r}.")
    if backend == "int8" and width > WIDEST:
        raise ValueError(
            f"Expected at most {WIDEST} features for `backend='int8'`, but got {width}. Use `backend='auto'`."
        )
    if backend in ("faiss", *APPROXIMATE):
        from lightning_advknn.search.scans.faiss_scan import import_faiss

        import_faiss()
        if backend == "faiss" and not in_memory:
            raise ValueError(
                "Expected a bank in memory for `backend='faiss'`, but it is on disk. Use another backend, or raise"
                " `memory_gib`."
            )


def _check(features: Rows, labels: Tensor, ids: Tensor, num_classes: int, metric: Metric) -> None:
    check_defaults()
    for name, column in (("features", features), ("labels", labels), ("ids", ids)):
        if not isinstance(column, Tensor | StoredRows):
            raise ValueError(
                f"Expected `{name}` to be a tensor, but got a {type(column).__name__}. Convert it with `torch.as_tensor`."
            )
    if features.ndim != 2 or not (len(features) == len(labels) == len(ids)) or 0 in features.shape:
        raise ValueError(
            "Expected at least one row and column of features (M, D), labels (M,) and ids (M,), but got shapes"
            f" {tuple(features.shape)}, {tuple(labels.shape)} and {tuple(ids.shape)}."
        )
    if metric not in get_args(Metric):
        raise ValueError(f"Expected `metric` to be one of {get_args(Metric)}, but got {metric!r}.")
    if features.dtype != torch.float32:
        raise ValueError(
            f"Expected float32 features, but got {features.dtype}. Convert them with `.float()`."
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"Expected int64 `ids`, but got {ids.dtype}. Convert them with `.long()`.")
    check_labels(labels, len(features), whole("num_classes", num_classes))
