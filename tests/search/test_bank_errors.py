"""Errors of banks and queries name the expectation, the value and the remedy."""

import pytest
import torch

from lightning_advknn.search import MemoryBank
from tests.search.oracle import both_metrics, make_bank


@both_metrics
@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_out_of_range(metric, k):
    bank = make_bank(torch.ones(8, 2), metric)
    for method in (bank.search, bank.votes):
        with pytest.raises(
            ValueError, match=rf"Expected `k` to be in \[1, 8\] \(the bank's rows\), but got {k}\."
        ):
            method(torch.ones(1, 2), k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_and_queries_must_be_finite(value):
    features = torch.ones(8, 3)
    bank = make_bank(features, "cosine")
    broken = features.clone()
    broken[2, 1] = broken[5, 0] = value
    with pytest.raises(ValueError, match=r"finite features, but 2 of 8 rows.*network's weights"):
        make_bank(broken, "cosine")
    with pytest.raises(ValueError, match="Expected finite query features"):
        bank.votes(broken, 2)


@pytest.mark.parametrize("shape", [(4, 2), (4, 4), (3,), (1, 1, 3)])
def test_queries_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"queries of shape \(B, 3\) as in the bank, but got"):
        make_bank(torch.ones(8, 3), "cosine").votes(torch.ones(shape), 2)


@pytest.mark.parametrize(
    ("features", "labels", "ids"),
    [((4, 2), 3, 4), ((4, 2), 4, 5), ((4,), 4, 4), ((0, 2), 0, 0), ((4, 2, 1), 4, 4), ((4, 0), 4, 4)],
)
def test_shapes_that_disagree(features, labels, ids):
    with pytest.raises(ValueError, match="Expected at least one row and column of features"):
        MemoryBank(torch.ones(features), torch.zeros(labels).long(), torch.zeros(ids).long(), 2)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_beyond_the_classes(wrong):
    with pytest.raises(
        ValueError, match=rf"labels` in \[0, 4\] \(the classes\), but got {min(wrong, 0)} to {max(wrong, 4)}"
    ):
        MemoryBank(torch.ones(3, 2), torch.tensor([0, 4, wrong]), torch.arange(3), 5)


def test_unknown_metric_or_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`metric` to be one of \('cosine', 'euclidean'\), but got 'l1'"):
        make_bank(torch.ones(2, 2), "l1")
    with pytest.raises(
        ValueError,
        match=r"`backend` to be one of \('auto', 'int8', .* 'faiss', 'ivf', 'hnsw'\), but got 'annoy'",
    ):
        make_bank(torch.ones(2, 2), "cosine", "annoy")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(device, dtype):
    features = torch.rand(9, 4)
    with pytest.raises(ValueError, match="Expected float32 features"):
        make_bank(features.to(dtype), "cosine", device=device)
    with pytest.raises(ValueError, match="Expected float32 queries"):
        make_bank(features, "cosine", device=device).votes(features.to(device, dtype), 3)
