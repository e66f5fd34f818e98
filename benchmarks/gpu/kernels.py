"""Scans of one bank beside each other: Triton's kernel, and torch in int8, bfloat16 and float32."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.clock import Record, guarded
from benchmarks.gpu.searches import asked, backends_on, name_of, ours
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.synthetic import Scene, scene
from lightning_advknn.choices import Backend

_FEW = 500


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record for each width, number of queries and backend."""
    for width in sizes.widths:
        made = scene(width, sizes.queries, device, sizes)
        for backend in backends_on(device):
            for n in dict.fromkeys((min(_FEW, sizes.queries), sizes.queries)):
                case = f"scan of {sizes.rows} x {width}, {n} queries"
                yield guarded(case, name_of(backend), partial(_scan, made, backend, n))


def _scan(made: Scene, backend: Backend, n: int) -> Record:
    votes = ours(made.bank, made.labels, made.sizes.k, backend)
    return asked(votes, made.queries[:n], made, name_of(backend))
