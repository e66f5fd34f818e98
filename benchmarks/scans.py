"""The searches that `benchmarks.search` compares, each timed in its own process.

Each returns votes for one layer's stored features. Imports are light, because every process repeats them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import timed
from lightning_advknn.choices import Backend, ScanPrecision
from lightning_advknn.functional import count_votes
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.scans.quantize import encode, fastest, lengths, products

QUERIES = ("clean", "bim")
_QUERIES, _ROWS = 500, 8192  # chunk sizes


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
    """Normalise, multiply in float32 and call `topk`, in chunks of queries."""
    rows = F.normalize(bank)

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


def measure(method: str, features: str, votes: str, k: int, repeats: int, rows: int | None) -> dict[str, Any]:
    """Time one method on one layer, in this process.

    Args:
        method: One of `METHODS`.
        features: File of a layer, from `benchmarks.features`.
        votes: File to write the votes to, by case.
        k: Number of neighbours.
        repeats: Repeats of each search.
        rows: Number of leave-one-out queries of other libraries; None for all.

    Returns:
        Times by case: ``bank`` (preparing features in memory), ``clean``, ``bim``, ``leave-one-out``; and the
        device's fastest ``precision``.
    """
    with safe_open(features, "pt") as stored:
        kept = {name: stored.get_tensor(name) for name in ("bank", "labels", *QUERIES)}
    bank, labels = kept["bank"], kept["labels"]
    precision = fastest(bank.device, bank.shape[1])
    times: dict[str, Any] = {"precision": precision}
    found: dict[str, Tensor] = {}
    prepare(method, bank[: k + 1], labels[: k + 1], k)  # imports libraries before timing
    search, times["bank"] = timed(lambda: prepare(method, bank, labels, k))
    for case in QUERIES:
        found[case], times[case] = timed(partial(search.votes, kept[case]), repeats)
    if search.leave_one_out is not None:
        n = len(bank) if method.startswith("lightning_advknn") or rows is None else min(rows, len(bank))
        once = search.leave_one_out
        found["leave-one-out"], time = timed(lambda: once(n))
        share = n / len(bank)
        times["leave-one-out"] = {**time, "seconds": time["seconds"] / share, "measured_share": share}
    save_file(found, votes)
    return times


def _count(labels: Tensor, indices: Tensor) -> Tensor:
    return count_votes(labels[indices], int(labels.max()) + 1)
