"""Rows at equal or nearly equal distances: the order is (distance, bank row), and float64 decides."""

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank, nearest
from tests.search.oracle import (
    both_metrics,
    brute_force,
    check,
    each_backend,
    exact_rows,
    make_bank,
    scans_of,
    true_distances,
)


@each_backend
@both_metrics
def test_duplicate_rows_order_by_row(device, metric, backend):
    generator = torch.Generator().manual_seed(4)
    distinct = torch.randn(15, 9, generator=generator)
    features = distinct[torch.randint(15, (300,), generator=generator)]
    queries = torch.randn(20, 9, generator=generator)
    bank = make_bank(features, metric, backend, device)
    check(bank, queries, 30, *brute_force(queries, features, metric, 30))


@both_metrics
def test_copies_tie_however_many_are_compared_at_once(device, metric):
    # So wide that 32 pairs are compared at once, and a last one alone: torch shares out a lone sum among
    # threads.
    generator = torch.Generator().manual_seed(30)
    features = torch.rand(1, 2**16, generator=generator).expand(33, -1).contiguous()
    queries = torch.rand(6, 2**16, generator=generator)
    bank = make_bank(features, metric, "float32", device)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for query in queries.to(device):
            assert bank.search(query[None], 33)[1].tolist() == [list(range(33))]
    finally:
        torch.set_num_threads(before)


def test_rows_order_by_distance_and_not_by_its_square(device):
    # sqrt(2^52 + 1) is 2^26 in float64.
    bank = make_bank(torch.tensor([[2.0**26, 1.0], [2.0**26, 0.0]]), "euclidean", device=device)
    distances, rows = bank.search(torch.zeros(1, 2, device=device), 2)
    assert distances.tolist() == [[2.0**26, 2.0**26]]
    assert rows.tolist() == [[0, 1]]


@each_backend
def test_parallel_rows_tie_by_cosine(device, backend):
    # Multiples of one vector round differently in float32 and in float64; they must tie all the same.
    generator = torch.Generator().manual_seed(5)
    directions = torch.randint(1, 9, (4, 12), generator=generator).float()
    scales = torch.randint(1, 1000, (200, 1), generator=generator).float()
    which = torch.randint(4, (200,), generator=generator)
    features, queries = directions[which] * scales, torch.rand(10, 12, generator=generator)
    _, rows = make_bank(features, "cosine", backend, device).search(queries.to(device), 30)
    similarities = (queries.double() @ directions.double().T) / directions.double().norm(dim=1)
    for query, found in enumerate(rows.tolist()):
        rank = (-similarities[query]).argsort().argsort()  # directions by similarity: no ties among four
        assert found == sorted(range(200), key=lambda row: (rank[which[row]].item(), row))[:30]


@each_backend
@both_metrics
@pytest.mark.parametrize("k", [1, 10, 75])
def test_integer_grids_with_massive_ties_widen_the_scan(device, metric, backend, k):
    generator = torch.Generator().manual_seed(6)
    features = torch.randint(3, (9000, 3), generator=generator).float()  # 27 distinct rows
    queries = torch.randint(3, (8, 3), generator=generator).float()
    bank = make_bank(features, metric, backend, device)
    rows = exact_rows(queries, features, metric, k)
    with scans_of(bank) as asked:
        _, found = bank.search(queries.to(device), k)
    assert found.tolist() == rows
    first = (3 * k if backend in ("int8", "bfloat16") else k) + 32
    assert asked[0][0] == first
    assert len(asked) > 1, "ties beyond the margin must widen the scan"
    assert asked[1][0] == min(9000, 8 * first)
    check(
        bank,
        queries,
        k,
        np.take_along_axis(true_distances(queries, features, metric), np.array(rows), 1),
        rows,
    )


@each_backend
@both_metrics
def test_near_ties_that_float32_gets_wrong(device, metric, backend):
    # 300 rows within a few last places of one vector: their distances differ by less than 1e-7 relative.
    generator = torch.Generator().manual_seed(9)
    centre = torch.rand(64, generator=generator) + 0.5
    features = centre * (1 + 2.0**-23 * torch.randint(-2, 3, (300, 64), generator=generator))
    queries = torch.rand(12, 64, generator=generator) + 0.5
    k = 20
    distances, rows = brute_force(queries, features, metric, k)
    spread = true_distances(queries, features, metric)
    assert (np.ptp(spread, axis=1) < 1e-6 * spread.mean(1)).all()
    # A plain float32 search takes the wrong rows for every one of these queries, on this device:
    q, x = queries.to(device), features.to(device)
    if metric == "cosine":
        scores = (q / q.norm(dim=1, keepdim=True)) @ (x / x.norm(dim=1, keepdim=True)).T
    else:
        scores = 2 * q @ x.T - x.square().sum(1)
    plain = scores.topk(k).indices.sort().values.cpu().numpy()
    assert (plain != np.sort(rows)).any(1).all()
    check(make_bank(features, metric, backend, device), queries, k, distances, rows)


@each_backend
@both_metrics
def test_near_ties_are_resolved_in_float64_and_not_by_row(device, metric, backend):
    # Each row is a hair nearer than the one before, so the nearest come last in the bank.
    features = torch.ones(50, 2)
    features[:, 1] = 1 + 2.0**-23 * torch.arange(50, 0, -1)
    queries = torch.tensor([[1.0, 1.0 - 2.0**-10]])
    bank = make_bank(features, metric, backend, device)
    # By cosine the angle to (1, 1) shrinks along the rows in steps of 1e-10 and more.
    _, rows = bank.search(queries.to(device), 4)
    assert rows.tolist() == [[49, 48, 47, 46]]


def test_votes_compare_nothing_where_all_in_doubt_have_one_label(device, monkeypatch):
    # 40 copies of one row tie: whichever 10 vote, they vote alike unless labels differ.
    features = torch.randn(1, 16, generator=torch.Generator().manual_seed(25)).expand(40, 16).contiguous()
    others = torch.randn(100, 16, generator=torch.Generator().manual_seed(26))
    compared = []
    compare = nearest.exact_similarities
    monkeypatch.setattr(
        nearest, "exact_similarities", lambda *pairs: compared.append(len(pairs[-1])) or compare(*pairs)
    )
    for odd in (False, True):
        labels = torch.cat([torch.full((40,), 2), torch.zeros(100).long()])
        labels[7] = 4 if odd else 2
        rows = torch.cat([features, others])
        bank = MemoryBank(rows, labels, torch.arange(140), 5, backend="float32").to(device)
        compared.clear()
        assert bank.votes(features[:1].to(device), 10).tolist() == [
            [0, 0, 9, 0, 1] if odd else [0, 0, 10, 0, 0]
        ]
        assert sum(compared) == (40 if odd else 0)
