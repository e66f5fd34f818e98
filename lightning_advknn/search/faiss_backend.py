"""faiss as a scan; the only file that imports faiss."""

from functools import cache
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.search.bounds import LARGEST, SMALLEST, float64_error, inverse, relative_error
from lightning_advknn.search.scan import Candidates, Metric, TorchScan, best_of


class FaissScan:
    """A flat faiss index over the bank, on the bank's device where faiss has GPU support.

    Args:
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which score.

    Raises:
        ImportError: If faiss is missing, unusable, or installed twice.
    """

    precision = "float32"

    def __init__(self, features: Tensor, norms: Tensor, metric: Metric) -> None:
        faiss = import_faiss()
        self.metric, self.device = metric, features.device
        self._reference = TorchScan(features, norms, metric, "float32")  # for what faiss cannot do
        self._most = len(features)  # rows that faiss can find
        self._longest, self._shortest = norms.max(), torch.where(norms > 0, norms, torch.inf).min()
        rows = features
        if metric == "cosine":
            rows = features * inverse(norms).to(features.dtype)[:, None]
            self._index = faiss.IndexFlatIP(features.shape[1])
        else:
            self._index = faiss.IndexFlatL2(features.shape[1])
        if features.is_cuda and getattr(faiss, "get_num_gpus", lambda: 0)():
            resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(resources, features.device.index or 0, self._index)
            self._most = 2048
        self._index.add(rows.contiguous().cpu().numpy())

    def __call__(self, queries: Tensor, n: int) -> Candidates:
        """Return the n likeliest rows for queries, float32 ``(B, D)``; n is in [1, M]."""
        if n > self._most:
            return self._reference(queries, n)
        found, indices = self._index.search(queries.contiguous().cpu().numpy(), n)
        rows = torch.from_numpy(indices).to(queries.device)
        if (rows < 0).any():  # faiss gives no row where a float32 score overflows
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


@cache  # what is installed takes a while to read
def import_faiss() -> Any:  # faiss ships no types
    """The faiss module; raises an ImportError if it is missing, unusable or installed twice."""
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
            f"Expected a working faiss for `backend='faiss'`, but importing it failed: {error}."
            f" Run {remedy} or use `backend='auto'`."
        ) from error
    return faiss
