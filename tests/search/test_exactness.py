"""Search and votes against brute force in float64, for both metrics and all exact backends."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lightning_advknn.search.scans import torch_scan
from lightning_advknn.search.scans.candidates import Candidates
from tests.search.oracle import (
    both_metrics,
    brute_force,
    check,
    each_backend,
    each_precision,
    make_bank,
    replaced_scan,
    scans_of,
)


@each_backend
@both_metrics
@pytest.mark.parametrize(
    ("rows", "width", "k"), [(1, 3, 1), (40, 2, 40), (300, 17, 5), (900, 64, 75), (2000, 5, 1)]
)
def test_random_features(device, metric, backend, rows, width, k):
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator)
    queries = torch.randn(30, width, generator=generator)
    check(
        make_bank(features, metric, backend, device), queries, k, *brute_force(queries, features, metric, k)
    )


@each_backend
@both_metrics
def test_rectified_features_with_zero_vectors(device, metric, backend):
    # As after a ReLU; a zero vector is at cosine distance 1 from everything, also from another zero vector.
    generator = torch.Generator().manual_seed(1)
    features = (torch.randn(400, 6, generator=generator) - 0.5).relu()
    queries = (torch.randn(60, 6, generator=generator) - 0.5).relu()
    features[7] = features[399] = queries[5] = 0
    check(
        make_bank(features, metric, backend, device), queries, 20, *brute_force(queries, features, metric, 20)
    )


def test_a_zero_query_takes_the_first_rows_by_cosine(device):
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    check(make_bank(features, "cosine", device=device), torch.zeros(1, 4), 3, [[1.0, 1.0, 1.0]], [[0, 1, 2]])


@each_backend
@both_metrics
def test_many_queries_and_a_bank_scanned_in_blocks(device, metric, backend, monkeypatch):
    limits = torch_scan._Limits(scores=1500, product=300, codes=9600)
    monkeypatch.setattr(torch_scan, "_limits", lambda device: limits)
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 16, "cuda": 16})
    for name, value in (
        ("similarities._elements", lambda device: 50),
        ("similarities._PAIRS", 30),
        ("quantize._elements", lambda device: 33),
    ):
        monkeypatch.setattr(f"lightning_advknn.search.scans.{name}", value)
    generator = torch.Generator().manual_seed(3)
    features, queries = torch.randn(300, 8, generator=generator), torch.randn(70, 8, generator=generator)
    check(
        make_bank(features, metric, backend, device), queries, 9, *brute_force(queries, features, metric, 9)
    )


@both_metrics
def test_only_doubtful_queries_are_scanned_again(device, metric):
    # 200 copies of one row: a query beside them is in doubt, queries elsewhere are not.
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(600, 8, generator=generator)
    features[::3] = 10 * features[0]
    queries = torch.cat([features[:1], -features[:1], torch.randn(3, 8, generator=generator)])
    bank = make_bank(features, metric, device=device)
    with scans_of(bank) as asked:
        _, rows = bank.search(queries.to(device), 5)
    assert asked[0][1] == 5
    assert len(asked) > 1
    assert max(queries for _, queries in asked[1:]) < 5
    assert rows.tolist() == brute_force(queries, features, metric, 5)[1].tolist()


@each_precision
@both_metrics
def test_distinct_features_are_scanned_once(device, metric, backend):
    generator = torch.Generator().manual_seed(8)
    bank = make_bank(torch.randn(2000, 64, generator=generator), metric, backend, device=device)
    with scans_of(bank) as asked:
        bank.search(torch.randn(20, 64, generator=generator).to(device), 75)
    assert asked == [(75 + 32 if backend == "float32" else 3 * 75 + 32, 20)]


@both_metrics
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_at_any_matmul_precision(device, metric, precision):
    generator = torch.Generator().manual_seed(12)
    features, queries = torch.randn(1200, 128, generator=generator), torch.randn(40, 128, generator=generator)
    bank = make_bank(features, metric, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(bank, queries, 25, *brute_force(queries, features, metric, 25))
    finally:
        torch.set_float32_matmul_precision(before)


def test_exact_under_torchs_newer_precision_switches(device):
    """Once they are set, torch refuses to say what its older switch stands at."""
    generator = torch.Generator().manual_seed(20)
    features, queries = torch.randn(300, 32, generator=generator), torch.randn(20, 32, generator=generator)
    bank = make_bank(features, "cosine", device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(bank, queries, 25, *brute_force(queries, features, "cosine", 25))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@both_metrics
def test_exact_under_autocast(device, metric):
    generator = torch.Generator().manual_seed(13)
    features, queries = torch.randn(1200, 128, generator=generator), torch.randn(40, 128, generator=generator)
    bank = make_bank(features, metric, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check(bank, queries, 25, *brute_force(queries, features, metric, 25))


@each_backend
@both_metrics
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e25])
@pytest.mark.parametrize("scaled", ["bank", "queries", "both", "half of the bank"])
def test_exact_at_any_scale(device, metric, backend, scale, scaled):
    generator = torch.Generator().manual_seed(14)
    features, queries = torch.randn(300, 24, generator=generator), torch.randn(10, 24, generator=generator)
    if scaled in ("queries", "both"):
        queries = queries * scale
    if scaled in ("bank", "both"):
        features = features * scale
    if scaled == "half of the bank":
        features[::2] *= scale
    distances, rows = brute_force(queries, features, metric, 15)
    bank = make_bank(features, metric, backend, device)
    found_distances, found = bank.search(queries.to(device), 15)
    assert found.tolist() == rows.tolist()
    np.testing.assert_allclose(found_distances.cpu(), distances, rtol=1e-11)
    labels = bank.labels.cpu()[torch.from_numpy(rows)]
    assert bank.votes(queries.to(device), 15).tolist() == [
        row.bincount(minlength=5).tolist() for row in labels
    ]


@both_metrics
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("noise", ["random", "against the order"])
def test_any_scan_within_its_bound_gives_exact_neighbours(device, metric, leave_out, noise):
    # The bank may trust a scan no further than its bound: here one that is as wrong as it says, to its own
    # end.
    generator = torch.Generator().manual_seed(18)
    features, k = torch.randn(200, 4, generator=generator), 10
    bank = make_bank(features, metric, device=device)
    bound = 0.3

    def scan(_, queries, n):
        q, x = queries.double(), bank.features.double()
        if metric == "cosine":
            similarity = q @ x.T / x.norm(dim=1) / q.norm(dim=1, keepdim=True)
        else:
            similarity = -torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        if noise == "random":
            scores = similarity + bound * (
                2 * torch.rand(similarity.shape, generator=generator).to(similarity) - 1
            )
        else:  # the nearest come out worse than they are, the rest better
            nearest = similarity.topk(k).values[:, -1:]
            scores = similarity + torch.where(similarity >= nearest, -bound, bound)
        found = (scores + bound + 1e-9).topk(n)
        return Candidates(found.values - 2 * bound - 2e-9, found.values, found.indices, found.values[:, -1:])

    own = torch.arange(200, device=device) if leave_out else None
    expected = brute_force(features, features, metric, k, own=np.arange(200) if leave_out else None)
    with replaced_scan(bank, scan):
        check(bank, features, k, *expected, own_ids=own)


@pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")
@both_metrics
def test_backends_vote_alike(device, metric):
    generator = torch.Generator().manual_seed(16)
    features = torch.randn(2000, 50, generator=generator).relu()
    queries = torch.randn(100, 50, generator=generator).relu().to(device)
    ours, theirs = (make_bank(features, metric, backend, device) for backend in ("int8", "faiss"))
    assert torch.equal(ours.votes(queries, 75), theirs.votes(queries, 75))
    assert torch.equal(ours.search(queries, 75)[1], theirs.search(queries, 75)[1])
