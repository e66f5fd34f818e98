"""Banks of random features, and their true neighbours: by brute force in float64 and in exact fractions."""

from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank

METRICS = ("cosine", "euclidean")
PRECISIONS = ("int8", "bfloat16", "float32")
BACKENDS = (
    *PRECISIONS,
    pytest.param("faiss", marks=pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")),
)

both_metrics = pytest.mark.parametrize("metric", METRICS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_precision = pytest.mark.parametrize("backend", PRECISIONS)


def make_bank(features, metric, backend="auto", device="cpu", num_classes=5, ids=None):
    labels = torch.from_numpy(np.random.default_rng(0).integers(num_classes, size=len(features)))
    ids = torch.arange(len(features)) if ids is None else ids
    return MemoryBank(features, labels, ids, num_classes, metric, backend).to(device)


def true_distances(queries, features, metric):
    """Float64 ``(B, M)``; cosine distances to 12 decimals, as the bank's contract says."""
    q, x = queries.double().numpy(), features.double().numpy()
    if metric == "euclidean":
        return np.stack([np.sqrt(((row - x) ** 2).sum(1)) for row in q])
    lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    similarities = np.divide(q @ x.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return 1 - similarities.round(12)


def brute_force(queries, features, metric, k, own=None):
    """Distances and rows of the k nearest, ties by bank row; `own` holds the row each query may not use."""
    distances = true_distances(queries, features, metric)
    if own is not None:
        distances[np.arange(len(own)), own] = np.inf
    rows = distances.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, 1), rows


def exact_rows(queries, features, metric, k):
    """The k nearest rows in exact rational arithmetic, for integer features."""
    rows = [tuple(x) for x in features.int().tolist()]
    result = []
    for q in queries.int().tolist():
        keys = {}
        for x in set(rows):
            if metric == "euclidean":
                keys[x] = sum((a - b) ** 2 for a, b in zip(q, x, strict=True))
            else:  # cos grows as sign(q.x) (q.x)^2 / |x|^2 does
                dot, square = sum(a * b for a, b in zip(q, x, strict=True)), sum(b * b for b in x)
                keys[x] = -Fraction(dot * abs(dot), square) if square else Fraction(0)
        rank = {key: place for place, key in enumerate(sorted(set(keys.values())))}
        result.append(sorted(range(len(rows)), key=lambda row: (rank[keys[rows[row]]], row))[:k])
    return result


def true_similarities(queries, features, metric):
    """Float64 ``(B, M)``."""
    q, x = queries.double(), features.double()
    if metric == "euclidean":
        return -torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return q @ x.T / x.norm(dim=1) / q.norm(dim=1, keepdim=True)


def check(bank, queries, k, distances, rows, own_ids=None):
    """Assert that search and votes give these neighbours."""
    device = bank.labels.device
    queries = queries.to(device)
    found_distances, found_rows = bank.search(queries, k, own_ids)
    assert found_distances.dtype == torch.float64
    assert found_rows.dtype == torch.int64
    assert found_rows.tolist() == np.asarray(rows).tolist()
    np.testing.assert_allclose(found_distances.cpu(), distances, rtol=1e-12, atol=2e-12)
    labels = bank.labels.cpu().numpy()[np.asarray(rows)]
    expected = [[(row == label).sum() for label in range(bank.num_classes)] for row in labels]
    assert bank.votes(queries, k, own_ids).tolist() == np.asarray(expected).tolist()


@contextmanager
def scans_of(bank):
    """The numbers of candidates and queries that each scan was asked for."""
    asked = []
    with replaced_scan(bank, lambda scan, queries, n: asked.append((n, len(queries))) or scan(queries, n)):
        yield asked


@contextmanager
def replaced_scan(bank, function):
    """Let ``function(scan, queries, n)`` answer for the bank's scan."""
    scan = bank._scanner()

    class Replacement:
        precision, device = scan.precision, scan.device

        def __call__(self, queries, n):
            return function(scan, queries, n)

    bank._scan = Replacement()
    yield
    bank._scan = scan
