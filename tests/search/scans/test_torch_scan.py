"""Bounds of scans hold, in every precision and of faiss."""

import pytest
import torch

from lightning_advknn.search.scans.torch_scan import TorchScan, _top
from tests.search.oracle import (
    both_metrics,
    brute_force,
    each_backend,
    each_precision,
    make_bank,
    true_similarities,
)


@both_metrics
def test_the_bound_allows_for_rounded_inputs_of_matmuls(metric):
    # Whether a device rounds them or not: TF32 keeps 10 bits of mantissa, bfloat16 7.
    generator = torch.Generator().manual_seed(19)
    features, queries = torch.rand(50, 64, generator=generator), torch.rand(9, 64, generator=generator)
    norms = features.double().norm(dim=1)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, mantissa in (("high", 10), ("medium", 7)):
            torch.set_float32_matmul_precision(precision)
            found = TorchScan(features, norms, metric, "float32")(queries, 50)
            # Truncate the mantissas, as the worst of such devices would.
            q, x = (
                (rows.view(torch.int32) & -(1 << 23 - mantissa)).view(torch.float32).double()
                for rows in (queries, features)
            )
            true, rounded = queries.double() @ features.double().T, q @ x.T
            size = norms * queries.double().norm(dim=1, keepdim=True) if metric == "cosine" else 0.5
            error = ((rounded - true) / size).abs().amax(1)
            bound = (found.upper - found.lower).amax(1) / 2
            assert (error <= bound).all()
            assert error.max() > bound.max() / 20, "the bound should not be far from what can happen"
    finally:
        torch.set_float32_matmul_precision(before)


@each_backend
@both_metrics
@pytest.mark.parametrize("width", [1, 7, 300, 3000])
@pytest.mark.parametrize(
    "scales", [(1, 1), (1e-6, 1e3), (1e5, 1e-4), (1e-15, 1e-8), (1e9, 1e9), (1e-25, 1e-12), (1e-41, 1)]
)
@pytest.mark.parametrize("kind", ["normal", "positive", "sparse", "outlier"])
def test_bounds_hold_what_a_scan_finds_and_what_it_does_not(device, metric, backend, width, scales, kind):
    generator = torch.Generator().manual_seed(width)
    queries = torch.randn(7, width, generator=generator)
    features = torch.randn(60, width, generator=generator)
    if kind == "positive":  # no cancellation, the rounding errors add up
        queries, features = queries.abs(), features.abs()
    if kind == "sparse":
        queries, features = (queries - 1).relu(), (features - 1).relu()
        queries[:, 0] += 0.1
        features[:, 0] += 0.1
    if kind == "outlier":  # takes all the levels of int8
        features[:, 0] *= 1e4
        queries[:3, 0] *= 1e4
    queries, features = queries * scales[0], features * scales[1]
    bank = make_bank(features, metric, backend, device)
    true = true_similarities(queries, features, metric)
    for n in (60, 20):
        found = bank._scanner()(queries.to(device), n)
        of_found = true.gather(1, found.indices.cpu())
        assert (found.lower.cpu() <= of_found).all()
        assert (of_found <= found.upper.cpu()).all()
        unseen = true.scatter(1, found.indices.cpu(), -torch.inf)
        assert (unseen <= found.unseen.cpu()).all()
        assert all(len(set(rows)) == n for rows in found.indices.tolist())


@each_backend
@both_metrics
def test_bounds_hold_for_a_query_of_zeros(device, metric, backend):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(31))
    true = torch.zeros(60) if metric == "cosine" else -features.double().square().sum(1)
    found = make_bank(features, metric, backend, device)._scanner()(torch.zeros(1, 5, device=device), 20)
    of_found = true[found.indices.cpu()]
    assert (found.lower.cpu() <= of_found).all()
    assert (of_found <= found.upper.cpu()).all()


@pytest.mark.parametrize(("precision", "widest"), [("int8", 0.04), ("bfloat16", 0.04), ("float32", 0.0005)])
def test_bounds_are_not_so_loose_as_to_be_useless(device, precision, widest):
    # 256 levels cost a vector of equally spread features some 1 / (255 sqrt(12) / sqrt(3)) of its length.
    generator = torch.Generator().manual_seed(21)
    features, queries = torch.rand(400, 300, generator=generator), torch.rand(5, 300, generator=generator)
    found = make_bank(features, "cosine", precision, device)._scanner()(queries.to(device), 10)
    assert 0 < (found.upper - found.lower).max() < widest


@each_precision
@both_metrics
def test_the_scan_keeps_the_best_rows(device, metric, backend):
    # Far enough apart for any precision: row i is turned by i degrees from the query.
    angles = torch.arange(300) * torch.pi / 300
    features = torch.stack([angles.cos(), angles.sin()], 1)[torch.randperm(300, generator=torch.Generator())]
    bank = make_bank(features, metric, backend, device)
    found = bank._scanner()(torch.tensor([[1.0, 0.0]], device=device), 40)
    nearest = brute_force(torch.tensor([[1.0, 0.0]]), features, metric, 30)[1]
    assert set(nearest[0].tolist()) <= set(found.indices[0].tolist())


@pytest.mark.parametrize("n", [1, 5, 100, 1000])
@pytest.mark.parametrize("size", [1000, 1003, 4001])
def test_top_equals_topk(n, size):
    scores = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    scores[0] = scores[0].round()  # ties
    found, where = _top(scores, n)
    assert found.sort(descending=True).values.tolist() == scores.topk(n).values.tolist()
    assert torch.equal(scores.gather(1, where), found)
    assert all(len(set(row)) == n for row in where.tolist())
