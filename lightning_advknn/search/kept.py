"""Rows that outlive the process which computed them: work that is interrupted goes on where it stopped."""

import fcntl
import hashlib
import os
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lightning_advknn.search.rows import StoredRows


class KeptRows(StoredRows):
    """float32 rows in a named file, with a journal beside it: a line for each lot of rows, with how many they are and their digest.

    Only rows that the journal vouches for count. So what an interrupted process, a full disk or a crash leaves reads as the
    part that is whole, and what has changed since as the part before it; the rest is to be appended again.

    Args:
        path: Of the file, ``<name>.rows``; the journal is ``<name>.rows.journal``.
        width: Columns.
        device: Of the tensors that are read.

    Raises:
        BlockingIOError: If another process is using the file.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: Path, width: int, device: torch.device) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = _open(path.with_name(f"{path.name}.journal"))
        fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        super().__init__(width, torch.float32, path.parent, device, _open(path))
        whole = 0  # bytes of the journal
        for line in self._journal.readlines():
            rows, _, digest = line.decode(errors="replace").partition(" ")
            if not rows.isdecimal() or self._digest(int(rows)) != digest:
                break
            self._rows += int(rows)
            whole += len(line)
        os.ftruncate(self._file.fileno(), self._rows * self._bytes)
        os.ftruncate(self._journal.fileno(), whole)
        self._journal.seek(whole)

    def append(self, rows: Tensor) -> None:
        """Add ``(n, width)``; once this returns, they are kept.

        Raises:
            OSError: If the disk is full.
        """
        super().append(rows)
        self._rows -= len(rows)
        line = f"{len(rows)} {self._digest(len(rows))}".encode()
        self._journal.write(line)
        self._rows += len(rows)

    def _digest(self, rows: int) -> str:
        """Of the file's next so many rows, and a line's end; "" if it has fewer."""
        total, left = hashlib.sha256(), rows * self._bytes
        start = self._rows * self._bytes
        while left:
            data = os.pread(self._file.fileno(), min(left, 2**24), start)
            if not data:
                return ""
            total.update(data)
            start, left = start + len(data), left - len(data)
        return f"{total.hexdigest()[:16]}\n"


def rows_on_disk(width: int, folder: Path | None, device: torch.device, name: str | None) -> StoredRows:
    """float32 rows in a file: kept under this name, or gone with the process if it has none or another process is using them."""
    if folder is not None and name is not None:
        try:
            return KeptRows(folder / f"{name}.rows", width, device)
        except BlockingIOError:
            pass
    return StoredRows(width, torch.float32, folder, device)


def _open(path: Path) -> FileIO:
    path.touch()
    return FileIO(path, "r+")
