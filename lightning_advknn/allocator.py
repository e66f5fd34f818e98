"""How the C library gives memory back to the system."""

import ctypes
import sys

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_KEPT_BLOCK = 256 * 2**20  # bytes: larger blocks, such as banks, are the system's again once they are freed
_KEPT_IN_ALL = 512 * 2**20  # bytes at the end of the heap


def keep_freed_memory() -> None:
    """Have this process keep the memory of tensors it frees, for the next ones.

    By default, glibc returns blocks of some megabytes to the system. A training step on a CPU frees and
    allocates a hundred of those, and with each the system has to find and clear every page anew. No number
    depends on it. Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions refuse thresholds above 32 MiB; then they keep their own.
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK):
        mallopt(_TRIM_THRESHOLD, _KEPT_IN_ALL)
