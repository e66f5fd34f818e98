"""The searches that `benchmarks.search` compares, each timed in its own process.

Each returns votes for one layer's stored features. Imports are light, because every process repeats them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.blas import used
from benchmarks.layer_files import load_bank, load_known
from benchmarks.measure import timed
from lightning_advknn.choices import Backend, ScanPrecision
from lightning_advknn.functional import count_votes
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.scans.quantize import encode, fastest, lengths, products

QUERIES, LEAVE_ONE_OUT = ("clean", "bim"), "leave-one-out"
CASES = (*QUERIES, LEAVE_ONE_OUT)
_QUERIES, _ROWS = 500, 1024  # chunk sizes
_WARM = 32  # queries before the clock starts


class Search(NamedTuple):
    """A prepared bank."""

    votes: Callable[[Tensor], Tensor]
    """Votes int64 ``(B, C)`` of queries float32 ``(B, D)``."""
    leave_one_out: Callable[[int], Tensor] | None = None
    """Leave-one-out votes on the first n rows; `ours` always computes all."""


def ours(bank: Tensor, labels: Tensor, k: int, backend: Backend = "auto") -> Search:
    """`MemoryBank`."""
    memory = MemoryBank(bank, labels, torch.arange(len(bank)), int(labels.max()) + 1, backend=backend)
    memory.votes(bank[:1], k)  # encodes the bank
    return Search(lambda queries: memory.votes(queries, k), lambda _: memory.leave_one_out_votes(k))


def plain_torch(bank: Tensor, labels: Tensor, k: int) -> Search:
    """Normalise the bank in place, multiply in float32 and call `topk`, in chunks of queries."""
    for part in torch.split(bank, _ROWS):
        part.copy_(F.normalize(part))
    rows = bank

    def votes(queries: Tensor, own: Tensor | None = None) -> Tensor:
        found = []
        for start in range(0, len(queries), _QUERIES):
            part = F.normalize(queries[start : start + _QUERIES])
            similarities = part @ rows.T
            if own is not None:
                similarities[torch.arange(len(part)), own[start : start + _QUERIES]] = -torch.inf
            found.append(similarities.topk(k, sorted=False).indices)
        return _count(labels, torch.cat(found))

    return Search(votes, lambda n: votes(bank[:n], torch.arange(n)))


def faiss_flat(bank: Tensor, labels: Tensor, k: int) -> Search:
    """`faiss.IndexFlatIP` on normalised rows."""
    from lightning_advknn.search.scans.faiss_scan import import_faiss

    index = import_faiss().IndexFlatIP(bank.shape[1])
    index.codes.resize(4 * bank.numel())  # reserves memory, which would grow by doubling
    index.codes.resize(0)
    for rows in torch.split(bank, _ROWS):
        index.add(F.normalize(rows).numpy())

    def votes(queries: Tensor) -> Tensor:
        _, found = index.search(F.normalize(queries).numpy(), k)
        return _count(labels, torch.from_numpy(found))

    return Search(votes)


def scikit_learn(bank: Tensor, labels: Tensor, k: int) -> Search:
    """`sklearn.neighbors.NearestNeighbors` by brute force and cosine."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank.numpy())

    def votes(queries: Tensor) -> Tensor:
        found = neighbours.kneighbors(queries.numpy(), return_distance=False)
        return _count(labels, torch.from_numpy(found))

    return Search(votes)


def bare_product(bank: Tensor, labels: Tensor, k: int, precision: ScanPrecision) -> Search:
    """Only the matrix product of the same shape, the hardware's limit; its votes are meaningless."""
    rows = encode(bank, lengths(bank), precision).values[:]

    def multiply(codes: Tensor) -> Tensor:
        for part in torch.split(codes, _QUERIES):
            products(part, rows)
        return labels[:0]

    return Search(
        lambda queries: multiply(encode(queries, lengths(queries), precision).values[:]),
        lambda n: multiply(rows[:n]),
    )


def prepare(method: str, bank: Tensor, labels: Tensor, k: int) -> Search:
    """Prepare the search of this name."""
    if method.startswith("bare"):
        precision = fastest(bank.device, bank.shape[1]) if method == "bare product" else "float32"
        return bare_product(bank, labels, k, precision)
    backends: dict[str, Backend] = {"lightning_advknn": "auto", "lightning_advknn float32": "float32"}
    if method in backends:
        return ours(bank, labels, k, backends[method])
    return {"faiss": faiss_flat, "scikit-learn": scikit_learn, "torch": plain_torch}[method](bank, labels, k)


METHODS = (
    "lightning_advknn",
    "lightning_advknn float32",
    "faiss",
    "scikit-learn",
    "torch",
    "bare product",
    "bare float32 product",
)


def measure(method: str, folder: str, cases: Sequence[str], k: int, rows: int) -> dict[str, Any]:
    """Time one method on one layer, in this process, each case once.

    Args:
        method: One of `METHODS`.
        folder: Of a layer, from `benchmarks.features`.
        cases: Some of `CASES`.
        k: Number of neighbours.
        rows: Number of leave-one-out queries of other libraries; 0 for all.

    Returns:
        By case, ``seconds`` and ``peak_mib`` so far; on how many queries votes are ``differing`` from the
        right ones, of how many ``checked``; and ``measured_share`` of the queries. Beside the cases: ``bank``
        (preparing features in memory), the device's fastest ``precision`` and ``blas``.
    """
    known = load_known(Path(folder))
    # Peers that copy the bank read it from its file, so that memory holds it once.
    bank, labels = load_bank(Path(folder), mapped=method in ("faiss", "scikit-learn")), known["labels"]
    found: dict[str, Any] = {"precision": fastest(bank.device, bank.shape[1])}
    prepare(method, bank[: k + 1].clone(), labels[: k + 1], k)  # imports libraries before timing
    search, found["bank"] = timed(lambda: prepare(method, bank, labels, k))
    search.votes(known["bim"][:_WARM])  # what the first call alone does
    for case in cases:
        share = 1.0
        if case in QUERIES:
            votes, time = timed(partial(search.votes, known[case]))
        elif search.leave_one_out is None:
            continue
        else:
            n = len(bank) if method.startswith("lightning_advknn") or not rows else min(rows, len(bank))
            votes, time = timed(partial(search.leave_one_out, n))
            share = n / len(bank)
        found[case] = {"seconds": time["seconds"] / share, "peak_mib": time["peak_mib"]}
        if case not in QUERIES:
            found[case]["measured_share"] = share
        if not method.startswith("bare"):
            found[case] |= _judge(votes, known, case)
    return {**found, "blas": used(method)}


def _judge(votes: Tensor, known: dict[str, Tensor], case: str) -> dict[str, int]:
    """Compare votes with the right ones."""
    right = known["checked_votes" if case == LEAVE_ONE_OUT else f"{case}_votes"]
    if case == LEAVE_ONE_OUT:  # another library may have answered the first rows only
        there = known["checked"] < len(votes)
        votes, right = votes[known["checked"][there]], right[there]
    return {"differing": int((votes != right).any(1).sum()), "checked": len(right)}


def _count(labels: Tensor, indices: Tensor) -> Tensor:
    return count_votes(labels[indices], int(labels.max()) + 1)
