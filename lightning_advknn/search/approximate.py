"""Approximate backends: what they are set to, what memory they take, and how many of the true neighbours they find."""

from collections.abc import Mapping
from copy import copy
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_advknn.search.bank import MemoryBank

APPROXIMATE = ("ivf", "hnsw")
"""Backends that may miss neighbours."""

_NAMES = {"ivf": ("nlist", "nprobe"), "hnsw": ("M", "efSearch")}
_TRAINING = 2**26  # features at most that an index learns its lists and levels from: 256 MiB
_COPIES = 4  # of them, as faiss learns
# Bytes of a feature: codes of one, in memory that faiss grows by doubling, list by list or (copying) all at once.
_CODE = {"ivf": 2, "hnsw": 3}


def index_settings(backend: str, rows: int, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """What an approximate index is made with, defaults filled in; empty of an exact backend.

    ``ivf`` sorts rows into ``nlist`` lists, by default as many as they are long, and looks into the ``nprobe`` nearest ones of
    a query, by default a 32nd of them and at least 8. ``hnsw`` links each row to ``M`` others (32) and follows the
    ``efSearch`` (256) best it has met, or as many as are asked for.

    Args:
        backend: Its name.
        rows: M of the bank.
        given: What differs from the defaults.

    Raises:
        ValueError: If a name is unknown to the backend or a value out of range.
    """
    known = _NAMES.get(backend, ())
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(
                f"Expected `index` of `backend={backend!r}` to have names among {list(known)}, but got {name!r}."
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"Expected `index.{name}` to be a whole number, but got {value!r}.")
    if not known:
        return {}
    if backend == "hnsw":
        found = {"M": 32, "efSearch": 256, **(given or {})}
        limits = {"M": (2, 512), "efSearch": (1, 2**31 - 1)}
    else:
        nlist = (given or {}).get("nlist", max(1, isqrt(rows)))
        found = {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 32)), **(given or {})}
        limits = {"nlist": (1, rows), "nprobe": (1, nlist)}
    for name, (low, high) in limits.items():
        if not low <= found[name] <= high:
            raise ValueError(f"Expected `index.{name}` to be in [{low}, {high}], but got {found[name]}.")
    return found


def index_bytes(
    backend: str, rows: int, widths: Mapping[str, int], given: Mapping[str, int] | None = None
) -> int:
    """What the indices of all layers take in memory, be their rows there or in a file; 0 of an exact backend."""
    if backend not in APPROXIMATE:
        return 0
    settings = index_settings(backend, rows, given)
    links = 8 + 2 * 4 * settings.get("M", 0) * 5 // 4  # and the row's number
    learning = max(training_rows(rows, width, settings) * width for width in widths.values())
    codes = sum(rows * (_CODE[backend] * width + links) for width in widths.values())
    return codes + _COPIES * 4 * learning


def training_rows(rows: int, width: int, settings: Mapping[str, int]) -> int:
    """How many of a bank's rows an index learns from."""
    lists = settings.get("nlist")
    return min(rows, max(lists or 1, _TRAINING // width), 64 * (lists or 1024))


def describe_index(backend: str, rows: int, given: Mapping[str, int] | None) -> dict[str, Any] | None:
    """What votes depend on beside exact ones; None of an exact backend."""
    return {"backend": backend, **index_settings(backend, rows, given)} if backend in APPROXIMATE else None


@torch.no_grad()
def recall(bank: "MemoryBank", queries: Tensor, k: int) -> Tensor:
    """Share of the true k nearest rows of each query that a bank finds, float64 ``(B,)``; 1 with an exact backend.

    Args:
        bank: With any backend; the truth is that of exact search in the same rows.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.

    Raises:
        ValueError: As `MemoryBank.search`.
    """
    exact = copy(bank)
    exact.backend, exact._scan = "float32", None  # which encodes nothing: there are few queries
    (_, found), (_, true) = bank.search(queries, k), exact.search(queries, k)
    return torch.stack([torch.isin(t, f).double().mean() for t, f in zip(true, found, strict=True)])
