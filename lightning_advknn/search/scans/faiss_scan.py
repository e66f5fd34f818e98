"""Scans by faiss, exact or approximate. No other file imports faiss."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.choices import Metric
from lightning_advknn.search.index_settings import index_settings, training_rows
from lightning_advknn.search.scans.candidates import Candidates, best_of
from lightning_advknn.search.scans.quantize import lengths
from lightning_advknn.search.scans.rounding import LARGEST, SMALLEST, float64_error, inverse, relative_error
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import Matrix

_BLOCK = 2**23  # features added to an index at once


class FaissScan:
    """A flat faiss index over the bank, on the bank's device where faiss has GPU support.

    Args:
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which similarity.

    Raises:
        ImportError: If faiss is missing, unusable, or installed twice.
    """

    precision = "float32"

    def __init__(self, features: Tensor, norms: Tensor, metric: Metric) -> None:
        faiss = import_faiss()
        self.metric, self.device = metric, features.device
        self._reference = TorchScan(features, norms, metric, "float32")  # where faiss cannot answer
        self._most = len(features)  # rows that faiss finds at once
        self._longest, self._shortest = norms.max(), torch.where(norms > 0, norms, torch.inf).min()
        rows = features
        if metric == "cosine":
            rows = features * inverse(norms).to(features.dtype)[:, None]
            self._index = faiss.IndexFlatIP(features.shape[1])
        else:
            self._index = faiss.IndexFlatL2(features.shape[1])
        if features.is_cuda and getattr(faiss, "get_num_gpus", lambda: 0)():
            self._resources = faiss.StandardGpuResources()  # older versions do not keep it alive
            self._index = faiss.index_cpu_to_gpu(self._resources, features.device.index or 0, self._index)
            self._most = 2048
        self._index.add(rows.contiguous().cpu().numpy())

    def __call__(self, queries: Tensor, n: int) -> Candidates:
        """The n likeliest rows for queries, float32 ``(B, D)``; n is in [1, M]."""
        if n > self._most:
            return self._reference(queries, n)
        found, indices = self._index.search(queries.contiguous().cpu().numpy(), n)
        rows = torch.from_numpy(indices).to(queries.device)
        if (rows < 0).any():  # faiss gives no row if a float32 score overflows
            return self._reference(queries, n)
        scores = torch.from_numpy(found).to(queries.device).double()
        width = queries.shape[1]
        length = torch.linalg.vector_norm(queries, dim=1, keepdim=True, dtype=torch.float64)
        relative = relative_error(width)
        lost = (width + 8) * SMALLEST * (1 + length + self._longest)
        fits = (length + self._longest).square() < LARGEST
        if self.metric == "cosine":  # the index holds unit vectors
            scores = scores * inverse(length)
            error = relative + lost * inverse(length) + 1e-12 + float64_error(width)
            fits &= self._shortest > SMALLEST
        else:  # |q|^2 - 2 q . x + |x|^2
            scores = -scores
            error = (relative + float64_error(width)) * (length + self._longest).square() + 4 * lost
        error = torch.where(fits, error, torch.inf)
        return best_of(self._index.ntotal, scores - error, scores + error, rows)


class ApproximateScan:
    """A faiss index of 8-bit codes in lists (IVF) or a graph (HNSW), which may miss neighbours; on the CPU.

    Rows that it proposes are compared exactly afterwards. Rows that it does not propose count as no
    neighbours, without a bound that would prove it. Queries for which it finds too few rows go to an exact
    scan.

    Rows are read in blocks, so they may be on disk; the index is in memory. Lists are reproducible with the
    same number of threads. Graphs are reproducible with one thread only, as several link rows in any order.

    Args:
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which similarity.
        backend: ``ivf`` or ``hnsw``.
        index: Settings that differ from the defaults of `index_settings`.

    Raises:
        ImportError: If faiss is missing, unusable, or installed twice.
        ValueError: If a setting is out of range, or rows are too long for Euclidean distances in float32.
    """

    precision = "float32"  # as many candidates beyond k as of a scan in float32

    def __init__(
        self, features: Matrix, norms: Tensor, metric: Metric, backend: str, index: Mapping[str, int] | None
    ) -> None:
        faiss = import_faiss()
        self.metric, self.device = metric, features.device
        self._features, self._norms = features, norms
        self._longest = norms.max()
        if metric == "euclidean" and self._longest > 2.0**60:
            raise ValueError(
                f"Expected features of Euclidean norm below 2^60 for `backend={backend!r}`, but got"
                f" {self._longest:.3g}. Use `backend='auto'`."
            )
        self._reference: TorchScan | None = None  # where faiss finds too few rows
        rows, width = features.shape
        settings = index_settings(backend, rows, index)
        kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        codes = faiss.ScalarQuantizer.QT_8bit
        self._index: Any
        if backend == "ivf":
            # An attribute, as the index does not keep the quantizer's Python object alive.
            self._quantizer = faiss.IndexFlat(width, kind)
            self._index = faiss.IndexIVFScalarQuantizer(
                self._quantizer, width, settings["nlist"], codes, kind
            )
            self._index.cp.min_points_per_centroid = 1  # no warning of small lists
            self._index.nprobe = settings["nprobe"]
        else:
            self._index = faiss.IndexHNSWSQ(width, codes, settings["M"], kind)
        self._ef = settings.get("efSearch")
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        chosen = chosen[: training_rows(rows, width, settings)].sort().values.to(self.device)
        self._index.train(self._values(features[chosen], norms[chosen]))
        step = max(1, _BLOCK // width)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            self._index.add(self._values(features[block], norms[block]))

    def __call__(self, queries: Tensor, n: int) -> Candidates:
        """N likely rows for queries, float32 ``(B, D)``; n is in [1, M]. No other row counts as nearer."""
        if self._ef is not None:
            self._index.hnsw.efSearch = max(self._ef, n)
        length = lengths(queries)
        found, indices = self._index.search(self._values(queries, length), n)
        rows, scores = (torch.from_numpy(part).to(self.device) for part in (indices, found))
        if self.metric == "cosine":
            similarity, doubt = scores.double(), torch.full_like(length, 4.0)
        else:
            similarity, doubt = -scores.double(), 4 * (length + self._longest).square()
        lower, upper = (
            similarity - doubt[:, None],
            similarity + doubt[:, None],
        )  # so wide that all are compared
        missing = (rows < 0).any(1)
        if missing.any():
            if self._reference is None:
                self._reference = TorchScan(self._features, self._norms, self.metric, "float32")
            exact = self._reference(queries[missing], n)
            lower[missing], upper[missing], rows[missing] = exact.lower, exact.upper, exact.indices
        return Candidates(lower, upper, rows, torch.full_like(lower[:, :1], -torch.inf))

    def _values(self, rows: Tensor, norms: Tensor) -> Any:
        """Rows as the index holds them, a NumPy array: unit vectors if the metric is cosine."""
        if self.metric == "cosine":
            # In two steps, as the inverse of a tiny norm exceeds float32.
            root = inverse(norms).sqrt().float()[:, None]
            rows = rows * root * root
        return rows.contiguous().cpu().numpy()


@cache  # reading the list of distributions takes a while
def import_faiss() -> Any:  # faiss ships no types
    """The faiss module.

    Raises:
        ImportError: If it is missing, unusable or installed twice.
    """
    installed = sorted(
        {d.name.lower() for d in distributions() if d.name and d.name.lower().startswith("faiss")}
    )
    if len(installed) > 1:
        raise ImportError(
            f"Expected one faiss distribution, but found {', '.join(installed)}: they overwrite each other."
            f" Run `pip uninstall {' '.join(installed)}`, then `pip install` one of them."
        )
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # RuntimeError: a GPU build without its CUDA libraries
        remedy = "`pip install faiss-cpu`"
        if installed:
            remedy = f"`pip uninstall {installed[0]}` and then {remedy}"
        raise ImportError(
            f"Expected a working faiss for this `backend`, but importing it failed: {error}."
            f" Run {remedy} or use `backend='auto'`."
        ) from error
    return faiss
