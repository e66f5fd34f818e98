"""Matrices too large for memory: rows are kept in a temporary file and read in blocks."""

import os
import shutil
import tempfile
import weakref
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor


class StoredRows:
    """A matrix in an anonymous temporary file, which the system frees when the process exits or crashes.

    It is read like a tensor, by slices of rows and by int64 indices. Only the rows that are read are in
    memory.

    Args:
        width: Columns.
        dtype: Of the numbers.
        folder: Where the file is; None for the system's temporary folder.
        device: Of the tensors that are read.
    """

    ndim = 2

    def __init__(self, width: int, dtype: torch.dtype, folder: Path | None, device: torch.device) -> None:
        self.width, self.dtype, self.folder, self.device = width, dtype, folder, device
        self._rows = 0
        self._row_bytes = width * torch.empty(0, dtype=dtype).element_size()
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
        """Changes whenever the file is written."""
        status = os.fstat(self._file.fileno())
        return self._rows, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def append(self, rows: Tensor) -> None:
        """Add ``(n, width)``.

        Raises:
            OSError: If the disk is full.
        """
        data = _bytes(rows.detach().to("cpu", self.dtype).contiguous())
        start = self._rows * self._row_bytes
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
            found = self._room(max(0, stop - start))
            self._read(found, start)
            return found.to(self.device, non_blocking=True)
        # Each row once, and rows that follow each other in the file together.
        asked = rows.to("cpu")
        wanted, places = torch.unique(asked, return_inverse=True)
        found = self._room(len(wanted))
        firsts = [0, *((wanted[1:] - wanted[:-1] > 1).nonzero().squeeze(1) + 1).tolist()]
        for first, end in pairwise([*firsts, len(wanted)]):
            if first < end:
                self._read(found[first:end], int(wanted[first]))
        found = found.to(self.device, non_blocking=True)
        return found if torch.equal(wanted, asked) else found[places.to(self.device)]

    def _room(self, n: int) -> Tensor:
        """Room for n rows; for a GPU in pinned memory, from which it copies while the next rows are read.

        Torch does not hand out pinned memory again before it has been copied.
        """
        return torch.empty(n, self.width, dtype=self.dtype, pin_memory=self.device.type == "cuda")

    def _read(self, into: Tensor, row: int) -> None:
        data = _bytes(into)
        done = 0
        while done < len(data):
            read = os.preadv(self._file.fileno(), [data[done:]], row * self._row_bytes + done)
            if not read:
                raise OSError(
                    f"Expected {len(data)} bytes from row {row} on in {self.folder}, but the file ends early."
                    " Something else has changed it: build the bank again."
                )
            done += read


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    data: memoryview = rows.flatten().view(torch.uint8).numpy().data
    return data


Matrix = Tensor | StoredRows
"""Rows ``(M, D)``, in memory or in a file."""
