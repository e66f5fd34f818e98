"""Which scan each backend stands for."""

from collections.abc import Mapping
from typing import get_args

from torch import Tensor

from lightning_advknn.choices import Backend, Metric
from lightning_advknn.search.index_settings import APPROXIMATE
from lightning_advknn.search.scans.candidates import Scan
from lightning_advknn.search.scans.faiss_scan import ApproximateScan, FaissScan, import_faiss
from lightning_advknn.search.scans.quantize import WIDEST, check_int8, fastest
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import Matrix


def check_backend(backend: Backend, width: int = 1, in_memory: bool = True) -> None:
    """Raise unless a backend can search features of this width, in memory or on disk.

    Raises:
        ImportError: If faiss is needed but missing, unusable or installed twice.
        ValueError: If the backend is unknown or cannot search such features.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"Expected `backend` to be one of {get_args(Backend)}, but got {backend!r}.")
    if backend == "int8" and width > WIDEST:
        raise ValueError(
            f"Expected at most {WIDEST} features for `backend='int8'`, but got {width}. Use `backend='auto'`."
        )
    if backend in ("faiss", *APPROXIMATE):
        import_faiss()
        if backend == "faiss" and not in_memory:
            raise ValueError(
                "Expected a bank in memory for `backend='faiss'`, but it is on disk. Use another backend, or"
                " raise `memory_gib`."
            )


def make_scan(
    features: Matrix, norms: Tensor, metric: Metric, backend: Backend, index: Mapping[str, int] | None
) -> Scan:
    """The scan of a bank, on the device of its features.

    Args:
        features: Bank rows, float32 ``(M, D)``.
        norms: Their Euclidean norms, float64 ``(M,)``.
        metric: Which similarity.
        backend: Which scan.
        index: Settings of an approximate backend that differ from its defaults.

    Raises:
        ValueError: If ``int8`` products overflow on the device.
    """
    if backend == "faiss":
        return FaissScan(features[:], norms, metric)
    if backend == "ivf" or backend == "hnsw":
        return ApproximateScan(features, norms, metric, backend, index)
    precision = fastest(features.device, features.shape[1]) if backend == "auto" else backend
    if precision == "int8":
        check_int8(features.device)
    return TorchScan(features, norms, metric, precision)
