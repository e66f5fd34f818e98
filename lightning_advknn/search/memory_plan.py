"""How much memory and disk banks and searches take."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lightning_advknn.search.index_settings import APPROXIMATE, index_settings, training_rows

_WORKING = 640 * 2**20  # bytes that a search takes at most, measured on 60000 x 16384

# Bytes per feature: float32, and the most that a scan holds of it, also while it is prepared. Approximate
# indices are counted separately, as they are in memory even if the rows are on disk.
_BYTES = {"float32": 4, "int8": 5, "triton": 5, "bfloat16": 6, "auto": 6, "faiss": 12, "ivf": 4, "hnsw": 4}

# Bytes per feature of an approximate index: one-byte codes, in memory that faiss grows by doubling, list by
# list for ivf, by a copy of everything for hnsw.
_CODE = {"ivf": 2, "hnsw": 3}
_COPIES = 4  # of the rows that faiss trains an index on


def check_room(
    folder: Path | None, rows: int, widths: Mapping[str, int], backend: str, copies: int = 1
) -> None:
    """Raise an OSError unless a disk has room for banks and their codes.

    Args:
        folder: On the disk; None for the system's temporary folder.
        rows: M.
        widths: D of each layer's bank that goes there.
        backend: What scans them.
        copies: Number of processes that each write them.
    """
    place = folder or Path(tempfile.gettempdir())
    needed = copies * rows * sum(widths.values()) * _BYTES[backend]
    times = f", {copies} times," if copies > 1 else ","
    if widths and needed > (free := shutil.disk_usage(place).free):
        raise OSError(
            f"Expected {needed / 2**30:.2f} GiB of room in {place} for the features of {rows} images"
            f" ({', '.join(widths)}){times} but it has {free / 2**30:.2f}. Free some, choose another folder,"
            " or raise `memory_gib`."
        )


def least_bytes(
    rows: int, widths: Mapping[str, int], backend: str = "auto", index: Mapping[str, int] | None = None
) -> int:
    """Memory that searches take if all banks are on disk, in bytes. Arguments are those of `in_memory`."""
    # Labels, ids, norms and a scan's terms of each row; candidates, and blocks of codes and scores.
    return rows * 120 * len(widths) + _WORKING + _index_bytes(backend, rows, widths, index)


def in_memory(
    rows: int,
    widths: dict[str, int],
    gib: float,
    backend: str = "auto",
    index: Mapping[str, int] | None = None,
) -> set[str]:
    """Layers whose banks fit into a limit of memory, narrow ones first. The others are read from disk.

    Args:
        rows: M.
        widths: D of each layer's bank.
        gib: Memory for banks and searches, in GiB, beyond that of Python and torch.
        backend: What scans them.
        index: Settings of an approximate backend.

    Raises:
        ValueError: If not even a search of banks on disk fits.
    """
    left = gib * 2**30 - least_bytes(rows, widths, backend, index)
    if left < 0:
        raise ValueError(
            f"Expected `memory_gib` to be at least {gib - left / 2**30:.2f} to search banks of {rows} rows"
            f" from disk, but got {gib}."
        )
    kept = set()
    for layer in sorted(widths, key=widths.__getitem__):
        left -= rows * widths[layer] * _BYTES[backend]
        if left < 0:
            break
        kept.add(layer)
    return kept


def _index_bytes(
    backend: str, rows: int, widths: Mapping[str, int], given: Mapping[str, int] | None = None
) -> int:
    """Memory that the indices of all layers take, in bytes; 0 for an exact backend."""
    if backend not in APPROXIMATE:
        return 0
    settings = index_settings(backend, rows, given)
    links = 8 + 2 * 4 * settings.get("M", 0) * 5 // 4  # and the row's number
    training = max(training_rows(rows, width, settings) * width for width in widths.values())
    codes = sum(rows * (_CODE[backend] * width + links) for width in widths.values())
    return codes + _COPIES * 4 * training
