"""How much each part measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Numbers of everything; the defaults are those of the MNIST experiment."""

    rows: int = 55_000
    """M."""
    widths: tuple[int, ...] = (12_544, 6_272, 1_152, 10)
    """D of each layer."""
    queries: int = 9_250
    checked: int = 256
    """Queries whose votes are compared with those of float64 brute force."""
    k: int = 75
    images: int = 9_250
    steps: int = 100
    """Of BIM."""
    few: int = 64
    """Images of attacks on victims, and of features that are compared with a CPU's."""
    training_steps: int = 400
    """Of the attacked network."""
    side: int = 8_192
    """Rows and columns of bare products."""
    copied: int = 2**32
    """Bytes."""
    repeats: int = 3


FULL = Sizes()
TINY = Sizes(
    rows=300,
    widths=(300, 40, 10),
    queries=60,
    checked=20,
    k=5,
    images=8,
    steps=2,
    few=4,
    training_steps=2,
    side=64,
    copied=2**16,
    repeats=2,
)
"""For tests, on a CPU."""
