"""Settings of approximate backends."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

APPROXIMATE = ("ivf", "hnsw")
"""Backends that may miss neighbours."""

_NAMES = {"ivf": ("nlist", "nprobe"), "hnsw": ("M", "efSearch")}
_TRAINING = 2**26  # features that an index is trained on, at most: 256 MiB


def index_settings(backend: str, rows: int, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """All settings of an approximate index, with defaults filled in; empty for an exact backend.

    ``ivf`` sorts rows into ``nlist`` lists (the square root of M) and searches the ``nprobe`` lists nearest
    to a query (a 32nd of them, but at least 8). ``hnsw`` links each row to ``M`` others (32) and follows the
    ``efSearch`` best rows met so far (256, or as many as are asked for).

    Args:
        backend: Its name.
        rows: M of the bank.
        given: Settings that differ from the defaults.

    Raises:
        ValueError: If a name is unknown to the backend or a value out of range.
    """
    known = _NAMES.get(backend, ())
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(
                f"Expected `index` of `backend={backend!r}` to have names among {list(known)}, but got"
                f" {name!r}."
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


def training_rows(rows: int, width: int, settings: Mapping[str, int]) -> int:
    """Number of a bank's rows that an index is trained on."""
    lists = settings.get("nlist")
    return min(rows, max(lists or 1, _TRAINING // width), 64 * (lists or 1024))


def describe_index(backend: str, rows: int, given: Mapping[str, int] | None) -> dict[str, Any] | None:
    """The backend with all its settings, as votes depend on them; None for an exact backend."""
    return {"backend": backend, **index_settings(backend, rows, given)} if backend in APPROXIMATE else None
