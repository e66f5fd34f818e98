"""Which scan each backend stands for."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import get_args

from torch import Tensor

from lightning_advknn.choices import Backend, Metric
from lightning_advknn.search.index_settings import APPROXIMATE
from lightning_advknn.search.scans.candidates import Scan
from lightning_advknn.search.scans.faiss_scan import ApproximateScan, FaissScan, import_faiss
from lightning_advknn.search.scans.quantize import WIDEST, check_int8, fastest
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.scans.triton_scan import TritonScan, runs_on
from lightning_advknn.search.stored_rows import Matrix


def check_backend(backend: Backend, width: int = 1, in_memory: bool = True) -> None:
    """Raise unless a backend can search features of this width, in memory or on disk.

    Raises:
        ImportError: If faiss is needed but missing, unusable or installed twice.
        ValueError: If the backend is unknown or cannot search such features.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"Expected `backend` to be one of {get_args(Backend)}, but got {backend!r}.")
    if backend in ("int8", "triton") and width > WIDEST:
        raise ValueError(
            f"Expected at most {WIDEST} features for `backend={backend!r}`, but got {width}. Use"
            " `backend='auto'`."
        )
    if backend == "triton" and not find_spec("triton"):
        raise ImportError(
            "Expected Triton for `backend='triton'`, but it is not installed: torch brings it on Linux. Use"
            " `backend='auto'`."
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
        ValueError: If ``int8`` products overflow on the device, or it cannot run ``triton``.
    """
    if backend == "faiss":
        return FaissScan(features[:], norms, metric)
    if backend == "ivf" or backend == "hnsw":
        return ApproximateScan(features, norms, metric, backend, index)
    if backend == "triton":
        if not runs_on(features.device):
            raise ValueError(
                "Expected a CUDA device of compute capability 8 or more for `backend='triton'`, but got"
                f" {features.device}. Use `backend='auto'`."
            )
        check_int8(features.device)  # of `TorchScan`, for what the kernel leaves to it
        return TritonScan(features, norms, metric, "int8")
    precision = fastest(features.device, features.shape[1]) if backend == "auto" else backend
    if precision == "int8":
        check_int8(features.device)
    return TorchScan(features, norms, metric, precision)
