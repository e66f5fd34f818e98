"""A stage of an experiment: something that is made once and kept in a file."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """Something to keep.

    Args:
        name: Of its file in the cache.
        label: What its wall time counts as, such as ``attack origin/fgsm``.
        make: Makes some of its rows.
        size: Number of its rows.
        step: Rows that are made together: it can be split at multiples of this.
    """

    name: str
    label: str
    make: Callable[[range], dict[str, Tensor]]
    size: int = 1
    step: int = 1

    def parts(self, most: int) -> list[tuple[str, range]]:
        """Names and rows of up to so many parts; a single one is the stage itself."""
        size = -(-self.size // (most * self.step)) * self.step
        rows = [range(first, min(first + size, self.size)) for first in range(0, self.size, size)]
        if len(rows) == 1:
            return [(self.name, rows[0])]
        return [(f"{self.name}.parts/{part.start:06d}-{part.stop:06d}", part) for part in rows]
