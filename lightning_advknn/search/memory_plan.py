"""How much memory and disk banks and searches take."""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from lightning_advknn.search.index_settings import APPROXIMATE, index_settings, training_rows

# Bytes that a search takes at most: on a CPU as measured on 60000 x 16384, on a GPU a share of its memory.
_WORKING = {"cpu": 640 * 2**20, "cuda": 2**32}
_WORKING_SHARE = 16
_BANKS_SHARE = 0.8  # of a GPU's free memory: the rest is for networks and attacks

_CPU = torch.device("cpu")

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


def working_bytes(device: torch.device) -> int:
    """Memory that a search takes at most, besides the bank and its codes, in bytes."""
    if device.type != "cuda":
        return _WORKING["cpu"]
    return min(_WORKING["cuda"], torch.cuda.get_device_properties(device).total_memory // _WORKING_SHARE)


def least_bytes(
    rows: int,
    widths: Mapping[str, int],
    backend: str = "auto",
    index: Mapping[str, int] | None = None,
    device: torch.device = _CPU,
) -> int:
    """Memory that searches take if all banks are on disk, in bytes. Arguments are those of `in_memory`."""
    # Labels, ids, norms and a scan's terms of each row; candidates, and blocks of codes and scores.
    return rows * 120 * len(widths) + working_bytes(device) + _index_bytes(backend, rows, widths, index)


def in_memory(
    rows: int,
    widths: dict[str, int],
    gib: float | None,
    backend: str = "auto",
    index: Mapping[str, int] | None = None,
    device: torch.device = _CPU,
) -> set[str]:
    """Layers whose banks fit into a limit of memory, narrow ones first. The others are read from disk.

    Args:
        rows: M.
        widths: D of each layer's bank.
        gib: Memory of the device for banks and searches, in GiB, beyond that of Python and torch. None for
            no limit; on a GPU, for most of what is free, and a line on stderr names what does not fit.
        backend: What scans them.
        index: Settings of an approximate backend.
        device: What they are searched on.

    Raises:
        ValueError: If not even a search of banks on disk fits.
    """
    if gib is None and device.type != "cuda":
        return set(widths)
    limit = _free_gib(device) if gib is None else gib
    left = limit * 2**30 - least_bytes(rows, widths, backend, index, device)
    if left < 0:
        wanted = f"{limit - left / 2**30:.2f}"
        expected = f"at least {wanted} GiB free for banks on {device}"
        if gib is not None:
            expected = f"`memory_gib` to be at least {wanted}"
        raise ValueError(
            f"Expected {expected} to search banks of {rows} rows from disk, but got {limit:.4g}."
        )
    kept = set()
    for layer in sorted(widths, key=widths.__getitem__):
        left -= rows * widths[layer] * _BYTES[backend]
        if left < 0:
            break
        kept.add(layer)
    if gib is None and (others := widths.keys() - kept):
        tqdm.write(
            f"Banks of {', '.join(sorted(others))} are kept on disk: of {rows} images they do not fit into"
            f" {limit:.1f} GiB, {_BANKS_SHARE:.0%} of what is free on {device}. `memory_gib` sets another limit.",
            file=sys.stderr,
        )
    return kept


def _free_gib(device: torch.device) -> float:
    """The share for banks of a GPU's free memory, with what torch holds of it without use, in GiB."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _BANKS_SHARE * (torch.cuda.mem_get_info(device)[0] + held) / 2**30


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
