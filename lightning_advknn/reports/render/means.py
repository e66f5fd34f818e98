"""Numbers over seeds, and how they are written."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """One number over seeds, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int = 2) -> str:
        """Mean ± standard deviation.

        >>> Mean((98.0, 99.0)).text(), Mean((0.5,)).text(digits=1)
        ('98.50 ± 0.71', '0.5')
        """
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")

    def __str__(self) -> str:
        """Mean ± standard deviation (number of seeds)."""
        return f"{self.text()} ({len(self.values)})"
