"""All queries of all layers: ours beside plain torch in float32 and faiss on GPUs."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import report
from benchmarks.gpu.clock import Record, guarded, measured
from benchmarks.gpu.searches import (
    FAISS,
    TORCH,
    Prepare,
    Votes,
    asked,
    faiss_gpu,
    has_faiss,
    ours,
    plain_torch,
)
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.synthetic import Scene, scene

_SUMS = ("seconds", "min", "max", "launches", "syncs", "differing", "checked")


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield records of making ready and of the queries for each layer and method, then sums over layers."""
    methods: dict[str, Prepare] = {report.OURS: partial(ours, backend="auto"), TORCH: plain_torch}
    if has_faiss(device):
        methods[FAISS] = faiss_gpu
    layers: dict[str, list[Record]] = defaultdict(list)
    for width in sizes.widths:
        made = scene(width, sizes.queries, device, sizes)
        case = f"{sizes.rows} rows: width {width}"
        for method, prepare in methods.items():
            ready: list[Votes] = []
            yield guarded(f"{case}, make ready", method, partial(_make_ready, made, prepare, ready))
            if ready:
                record = guarded(
                    f"{case}, {sizes.queries} queries",
                    method,
                    partial(asked, ready[0], made.queries, made, method),
                )
                layers[method].append(record)
                yield record
    for method, records in layers.items():
        if len(records) == len(sizes.widths) and not any("failed" in record for record in records):
            case = f"{sizes.rows} rows: all layers, {sizes.queries} queries"
            yield {"case": case, "method": method, **_total(records)}


def _make_ready(made: Scene, prepare: Prepare, ready: list[Votes]) -> Record:
    """Prepare a search, which goes into the list."""
    votes, found = measured(lambda: prepare(made.bank, made.labels, made.sizes.k), made.device, 1)
    ready.append(votes)
    return found


def _total(records: list[Record]) -> Record:
    """Sums over layers."""
    total: Record = {key: sum(record[key] for record in records) for key in _SUMS if key in records[0]}
    total |= {key: max(record[key] for record in records) for key in ("peak_mib", "spread")}
    total |= {"exact": not total["differing"], "repeats": min(record["repeats"] for record in records)}
    return {**total, "work": [each for record in records for each in record["work"]]}
