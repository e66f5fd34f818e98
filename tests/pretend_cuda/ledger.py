"""What a program asked of the pretended GPUs, counted by the line of the package that asked."""

import sys
from collections import Counter

_PACKAGE = "lightning_advknn"


class Ledger:
    """Counts by place.

    Attributes:
        launches: Operators that compute; each launches at least one kernel.
        syncs: Waits of the host for a result: `item`, `nonzero`, boolean indices, copies to the CPU.
        uploads: Copies of CPU tensors to a GPU. Those that are not `non_blocking` wait for the GPU, too.
        downloads: Copies of GPU tensors to the CPU.
        operators: Launches by the operator's name, not by place.
    """

    def __init__(self):
        self.launches, self.syncs, self.uploads, self.downloads = Counter(), Counter(), Counter(), Counter()
        self.operators = Counter()

    def reset(self):
        self.__init__()

    def totals(self):
        kinds = ("launches", "syncs", "uploads", "downloads")
        return {kind: getattr(self, kind).total() for kind in kinds}

    def table(self, most=15):
        """All totals, and the places with most of each."""
        lines = []
        for kind, total in self.totals().items():
            lines.append(f"{kind} {total}")
            lines += [f"  {count:8}  {place}" for place, count in getattr(self, kind).most_common(most)]
        return "\n".join(lines)


ledger = Ledger()


def place():
    """The innermost line of the package that runs now; backward passes run in threads without one."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if f"/{_PACKAGE}/" in file:
            return f"{file.rsplit(f'/{_PACKAGE}/', 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
