"""`MemoryBank`: the stored training features, and exact search in them."""

from collections.abc import Iterator, Mapping
from copy import copy
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn.choices import Backend, Metric
from lightning_advknn.functional import count_votes
from lightning_advknn.search.backends import check_backend, make_scan
from lightning_advknn.search.checks import check_finite, check_k, check_queries, check_rows
from lightning_advknn.search.index_settings import APPROXIMATE, index_settings
from lightning_advknn.search.nearest import Searchable, nearest_rows
from lightning_advknn.search.scans.candidates import Candidates, Scan
from lightning_advknn.search.scans.quantize import lengths
from lightning_advknn.search.scans.rounding import inverse
from lightning_advknn.search.scans.self_scan import candidates_of_all
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import Matrix

_AT_ONCE = {"cpu": 512, "cuda": 4096, "disk": 2048}  # queries


class MemoryBank(nn.Module):
    """Features of the training images with their labels, and their exact k nearest rows.

    Distances are those of float64 arithmetic on the stored float32 features, whatever the backend. The
    backend's scan only proposes candidates, with rigorous bounds on their similarities. Candidates in doubt
    are compared more closely, at last in float64. A query is scanned again, more widely, if another row could
    be among its k nearest.

    Neighbours order by (distance, bank row). Cosine distances are rounded to 12 decimals, so rows that tie in
    exact arithmetic tie here, unless their cosine is within about 1e-15 of the edge between two decimals.
    Copies of a row always tie.

    Args:
        features: Raw activations, float32 ``(M, D)``, in memory or in a file.
        labels: int64 ``(M,)``, in [0, C).
        ids: Image ids, int64 ``(M,)``. By its id an image can be kept from voting for itself.
        num_classes: C.
        metric: ``cosine``: 1 - cosine similarity; a zero vector has distance 1 to all. ``euclidean``: L2.
        backend: What scans the bank: matrix products in a precision (``auto``: the one in which the device is
            fastest) or faiss. No neighbour depends on it, except that ``ivf`` and ``hnsw`` are approximate:
            neighbours are the nearest of the rows that faiss proposes, and `search.recall` measures how many
            it misses.
        index: Settings of an approximate backend that differ from its defaults (`search.index_settings`).
        image_shape: Shape ``(channels, H, W)`` of the images, if it is known.

    Raises:
        ImportError: If faiss is needed but missing, unusable or installed twice.
        ValueError: If shapes disagree, a label is no class or not int64, a feature is not finite, the metric
            is unknown, or the backend cannot search such features. At the first search: if ``int8`` products
            overflow on the device.
    """

    features: Matrix
    labels: Tensor
    ids: Tensor
    norms: Tensor

    def __init__(
        self,
        features: Matrix,
        labels: Tensor,
        ids: Tensor,
        num_classes: int,
        metric: Metric = "cosine",
        backend: Backend = "auto",
        index: Mapping[str, int] | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        check_rows(features, labels, ids, num_classes, metric)
        check_backend(backend, features.shape[1], isinstance(features, Tensor))
        index_settings(backend, len(features), index)  # refuses what is out of range
        norms = lengths(features)
        check_finite(norms)
        self.num_classes, self.metric, self.backend, self.index = num_classes, metric, backend, index
        self.image_shape = image_shape
        self._most_of_one = most_of_one(ids)
        self._scan: Scan | None = None  # made at the first search
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
        """A bank of one class's rows alone, and which rows these are, int64 ``(n,)``.

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

    def as_exact(self) -> "MemoryBank":
        """A bank of the same rows, in the same memory, with an exact backend that is ready at once."""
        exact = copy(self)
        exact.backend, exact.index, exact._scan = "float32", None, None
        return exact

    def check_k(self, k: int, leave_one_out: bool = False) -> None:
        """Raise a ValueError unless k is a whole number and the bank has k rows that can vote."""
        check_k(k, len(self), self._most_of_one if leave_one_out else 0)

    def check_queries(self, queries: Tensor, own_ids: Tensor | None = None) -> None:
        """Raise a ValueError unless queries are finite features of the bank's width, float32 ``(B, D)``.

        Their image ids, if given, are ``(B,)``.
        """
        check_queries(queries, self.features.shape[1], own_ids)

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
        """Counted labels of the k nearest rows, int64 ``(B, C)``. Arguments are those of `search`."""
        _, indices = self._nearest(queries, k, own_ids, in_order=False)
        return count_votes(self.labels[indices], self.num_classes)

    @torch.no_grad()
    def leave_one_out_votes(self, k: int) -> Tensor:
        """Votes on each of the bank's own rows, without itself, int64 ``(M, C)``.

        They equal ``votes(features, k, ids)``, but take less time.

        Raises:
            ValueError: If k exceeds the other rows.
        """
        self.check_k(k, leave_one_out=True)
        at_once, scan, bank = self._at_once, self._scanner(), self._searchable
        n = bank.candidates(k, True, scan.precision)
        votes = torch.empty(len(self), self.num_classes, dtype=torch.int64, device=self.labels.device)
        found: Iterator[Candidates | None] = repeat(None)
        if isinstance(scan, TorchScan) and scan.symmetric and 2 * n < len(self):
            found = candidates_of_all(scan, self.norms, n, at_once)
        starts = range(0, len(self), at_once)
        for start in tqdm(starts, desc="leave-one-out votes", disable=None, leave=False):
            rows = slice(start, start + at_once)
            queries, own_ids = self.features[rows], self.ids[rows]
            _, indices = nearest_rows(bank, scan, queries, k, own_ids, in_order=False, found=next(found))
            votes[rows] = count_votes(self.labels[indices], self.num_classes)
        return votes

    @torch.no_grad()
    def nearby(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """About the n nearest rows, most similar first: cheaper than `search`, where a direction is enough.

        Similarities are those of the scan, with its errors. So rows about as near as the n-th may be missing,
        and rows at about the same distance may be in another order.

        Args:
            queries: Raw activations, float32 ``(B, D)``.
            n: Number of rows.

        Returns:
            Similarities float64 ``(B, n)`` (cosines or minus squared distances), and bank rows int64
            ``(B, n)``.

        Raises:
            ValueError: If n exceeds the rows, or the queries have another width or are not finite.
        """
        self.check_k(n)
        self.check_queries(queries)
        similarities, indices = [], []
        for chunk in torch.split(queries, self._at_once):
            found = self._scanner()(chunk, n)
            middle = ((found.lower + found.upper) / 2).nan_to_num(0.0)  # NaN where arithmetic overflowed
            middle, order = middle.sort(dim=1, descending=True, stable=True)
            similarities.append(middle)
            indices.append(found.indices.gather(1, order))
        return torch.cat(similarities), torch.cat(indices)

    @torch.no_grad()
    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of bank rows, which are scaled to unit length if the metric is cosine.

        Args:
            rows: int64 ``(B, n)``.
            weights: float64 ``(B, n)``.

        Returns:
            float32 ``(B, D)``.
        """
        if self.metric == "cosine":
            weights = weights * inverse(self.norms)[rows]
        weights = weights.to(torch.float32)
        if isinstance(self.features, Tensor):  # without a copy of the rows
            return F.embedding_bag(rows, self.features, mode="sum", per_sample_weights=weights)
        sums = torch.empty(len(rows), self.features.shape[1], device=rows.device)
        for i, each in enumerate(rows):
            sums[i] = weights[i] @ self.features[each]
        return sums

    def _nearest(
        self, queries: Tensor, k: int, own_ids: Tensor | None, in_order: bool
    ) -> tuple[Tensor, Tensor]:
        self.check_k(k, leave_one_out=own_ids is not None)
        self.check_queries(queries, own_ids)
        similarities = queries.new_empty(len(queries), k, dtype=torch.float64)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        at_once, bank = self._at_once, self._searchable
        starts = range(0, len(queries), at_once)
        for start in tqdm(starts, desc="search", disable=None if len(starts) > 8 else True, leave=False):
            some = slice(start, start + at_once)
            own = None if own_ids is None else own_ids[some]
            found = nearest_rows(bank, self._scanner(), queries[some], k, own, in_order)
            similarities[some], indices[some] = found
        return similarities, indices

    @property
    def _at_once(self) -> int:
        """Number of queries that are searched at once."""
        return _AT_ONCE[self.labels.device.type if isinstance(self.features, Tensor) else "disk"]

    @property
    def _searchable(self) -> Searchable:
        return Searchable(self.features, self.norms, self.labels, self.ids, self.metric, self._most_of_one)

    def _scanner(self) -> Scan:
        """Made at the first search, and again after the bank has moved to another device."""
        if self._scan is None or self._scan.device != self.features.device:
            self._scan = make_scan(self.features, self.norms, self.metric, self.backend, self.index)
        return self._scan


def most_of_one(ids: Tensor) -> int:
    """The largest number of rows that have one image id, of ids ``(M,)``."""
    return int(torch.unique(ids, return_counts=True)[1].max())
