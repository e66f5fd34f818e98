"""Matrices too large for memory: rows kept in a file, read block by block."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_advknn.search.approximate import index_bytes

_WORKING = 640 * 2**20  # bytes that a search takes at most, measured on 60000 x 16384
# Bytes of a feature in memory: float32, and what a scan keeps of it, or makes on the way there.
# Indices of approximate backends are counted apart: they are in memory wherever the rows are.
_BYTES = {"float32": 4, "int8": 5, "bfloat16": 6, "auto": 6, "faiss": 12, "ivf": 4, "hnsw": 4}


class StoredRows:
    """A matrix in a file that is as good as gone: it has no name, and its space is free once the process ends, however that happens.

    Read like a tensor, by slices of rows and by int64 indices; only what is read is in memory.

    Args:
        width: Columns.
        dtype: Of the numbers.
        folder: Where the file is, on a disk with room; None for the system's temporary folder.
        device: Of the tensors that are read.
    """

    ndim = 2

    def __init__(self, width: int, dtype: torch.dtype, folder: Path | None, device: torch.device) -> None:
        self.width, self.dtype, self.folder, self.device = width, dtype, folder, device
        self._rows = 0
        self._bytes = width * torch.empty(0, dtype=dtype).element_size()  # of a row
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._rows

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._rows, self.width

    @property
    def stamp(self) -> tuple[int, ...]:
        """What changes when the file is written."""
        status = os.fstat(self._file.fileno())
        return self._rows, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def append(self, rows: Tensor) -> None:
        """Add ``(n, width)``.

        Raises:
            OSError: If the disk is full.
        """
        data = _bytes(rows.detach().to("cpu", self.dtype).contiguous())
        start = self._rows * self._bytes
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        except OSError as error:
            folder = self.folder or tempfile.gettempdir()
            raise OSError(
                f"Expected room for {len(data)} more bytes of features in {folder}, but {error}; it has"
                f" {shutil.disk_usage(folder).free} free. Free some, or raise `memory_gib`."
            ) from error
        self._rows += len(rows)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self._rows)
            if step != 1:
                return self[torch.arange(start, stop, step)]
            found = torch.empty(max(0, stop - start), self.width, dtype=self.dtype)
            self._read(found, start)
        else:
            found = torch.empty(len(rows), self.width, dtype=self.dtype)
            for place, row in enumerate(rows.tolist()):
                self._read(found[place], row)
        return found.to(self.device)

    def _read(self, into: Tensor, row: int) -> None:
        data = _bytes(into)
        done = 0
        while done < len(data):
            read = os.preadv(self._file.fileno(), [data[done:]], row * self._bytes + done)
            if not read:
                raise OSError(
                    f"Expected {len(data)} bytes of row {row} in {self.folder}, but the file ends early."
                )
            done += read


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    data: memoryview = rows.flatten().view(torch.uint8).numpy().data
    return data


Rows = Tensor | StoredRows
"""float32 ``(M, D)``: in memory, or in a file."""


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
