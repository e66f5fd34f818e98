"""Bounds of single pairs hold the exact similarities."""

import pytest
import torch

from lightning_advknn.search.scans import similarities
from tests.search.oracle import both_metrics, true_similarities


@both_metrics
@pytest.mark.parametrize("kind", ["rectified", "normal", "near ties", "scaled"])
def test_bounded_similarities_hold_the_exact_ones(device, metric, kind):
    generator = torch.Generator().manual_seed(22)
    queries, features = torch.randn(9, 2048, generator=generator), torch.randn(50, 2048, generator=generator)
    if kind == "rectified":
        queries, features = queries.relu(), features.relu()
    if kind == "near ties":
        features = queries[:1] * (1 + 2.0**-22 * torch.randint(-2, 3, features.shape, generator=generator))
    if kind == "scaled":
        features *= 10.0 ** torch.randint(-20, 20, (50, 1), generator=generator)
    rows = torch.rand(9, 50, generator=generator) < 0.4
    rows[4] = False  # a query of no pair
    norms = features.double().norm(dim=1)
    true = true_similarities(queries, features, metric)[rows]
    both = queries.to(device), features.to(device)
    pairs = metric, *(part.to(device) for part in rows.nonzero(as_tuple=True))
    lower, upper = (
        bound.cpu() for bound in similarities.bounded_similarities(*both, norms.to(device), *pairs)
    )
    assert (lower <= true).all()
    assert (true <= upper).all()
    if kind != "scaled":
        size = 1 if metric == "cosine" else queries.norm(dim=1).max() * norms.max()
        assert (upper - lower).max() < 6e-4 * size
    in_float64 = similarities.exact_similarities(*both, *pairs).cpu()
    torch.testing.assert_close(in_float64, true, rtol=1e-12, atol=1e-12)


def test_dots_are_the_same_sampled_and_gathered():
    generator = torch.Generator().manual_seed(23)
    queries, features = torch.randn(9, 96, generator=generator), torch.randn(40, 96, generator=generator)
    pairs = (torch.rand(9, 40, generator=generator) < 0.3).nonzero(as_tuple=True)
    expected = (queries.double() @ features.double().T)[pairs]
    for dots in (similarities._sampled_dots, similarities._gathered_dots):
        for segments in (1, 4):
            torch.testing.assert_close(
                dots(queries, features, *pairs, segments), expected, rtol=1e-5, atol=1e-5
            )
