"""Votes of every backend at every width, against float64 brute force on the same device."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.clock import Record, guarded
from benchmarks.gpu.searches import backends_on, name_of, ours
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.synthetic import Scene, differing, scene
from lightning_advknn.choices import Backend


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record for each width and backend: on how many queries votes differ."""
    for width in sizes.widths:
        made = scene(width, sizes.checked, device, sizes)
        case = f"{sizes.rows} x {width}: votes of {sizes.checked} queries"
        for backend in backends_on(device):
            if backend != "auto":
                yield guarded(case, name_of(backend), partial(_judged, made, backend))


def _judged(made: Scene, backend: Backend) -> Record:
    votes = ours(made.bank, made.labels, made.sizes.k, backend)
    return differing(votes(made.queries), made.right)
