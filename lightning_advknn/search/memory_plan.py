"""What banks and searches take: in memory, and on disk."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lightning_advknn.search.index_settings import APPROXIMATE, index_settings, training_rows

_WORKING = 640 * 2**20  # bytes that a search takes at most, measured on 60000 x 16384


# Bytes of a feature in memory: float32, and what a scan keeps of it, or makes on the way there.
# Indices of approximate backends are counted apart: they are in memory wherever the rows are.
_BYTES = {"float32": 4, "int8": 5, "bfloat16": 6, "auto": 6, "faiss": 12, "ivf": 4, "hnsw": 4}


def check_room(
    folder: Path | None, rows: int, widths: Mapping[str, int], backend: str, copies: int = 1
) -> None:
    """Raise an OSError unless a disk has room for banks and their codes.

    Args:
        folder: On the disk; None for the system's temporary folder.
        rows: M.
        widths: D of each layer's bank that goes there.
        backend: What scans them.
        copies: Processes that each write them.
    """
    place = folder or Path(tempfile.gettempdir())
    needed = copies * rows * sum(widths.values()) * _BYTES[backend]
    times = f", {copies} times," if copies > 1 else ""
    if widths and needed > (free := shutil.disk_usage(place).free):
        raise OSError(
            f"Expected {needed / 2**30:.2f} GiB of room in {place} for the features of {rows} images"
            f" ({', '.join(widths)}){times or ','} but it has {free / 2**30:.2f}. Free some, choose another folder, or raise `memory_gib`."
        )


def least_bytes(
    rows: int, widths: Mapping[str, int], backend: str = "auto", index: Mapping[str, int] | None = None
) -> int:
    """Memory that searching banks takes if all of them are on disk; arguments as of `in_memory`."""
    # Labels, ids, norms and what a scan keeps of each row; candidates and blocks of codes and scores.
    return rows * 120 * len(widths) + _WORKING + index_bytes(backend, rows, widths, index)


def in_memory(
    rows: int,
    widths: dict[str, int],
    gib: float,
    backend: str = "auto",
    index: Mapping[str, int] | None = None,
) -> set[str]:
    """Which banks fit into so much memory together with what searching them takes; the others are read from disk.

    Args:
        rows: M.
        widths: D of each layer's bank.
        gib: Memory for banks and searches, in GiB, beyond that of Python and torch.
        backend: What scans them.
        index: Its settings, if it is approximate.

    Raises:
        ValueError: If not even a search of banks on disk fits.
    """
    left = gib * 2**30 - least_bytes(rows, widths, backend, index)
    if left < 0:
        raise ValueError(
            f"Expected `memory_gib` to be at least {gib - left / 2**30:.2f} to search banks of {rows} rows from disk,"
            f" but got {gib}."
        )
    kept = set()
    for layer in sorted(widths, key=widths.__getitem__):
        left -= rows * widths[layer] * _BYTES[backend]
        if left < 0:
            break
        kept.add(layer)
    return kept


_COPIES = 4  # of them, as faiss learns


# Bytes of a feature: codes of one, in memory that faiss grows by doubling, list by list or (copying) all at once.
_CODE = {"ivf": 2, "hnsw": 3}


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
