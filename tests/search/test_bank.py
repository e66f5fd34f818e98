"""What else a bank does: it moves, gives rows nearby, sums rows, makes banks of one class."""

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank
from lightning_advknn.search.stored_rows import StoredRows
from tests.search.oracle import (
    both_metrics,
    brute_force,
    each_backend,
    each_precision,
    make_bank,
    true_distances,
)


@both_metrics
def test_no_queries(device, metric):
    bank = make_bank(torch.ones(8, 2), metric, device=device)
    assert bank.search(torch.empty(0, 2, device=device), 3)[1].shape == (0, 3)
    assert bank.votes(torch.empty(0, 2, device=device), 3).shape == (0, 5)


def test_the_bank_is_not_saved_with_checkpoints():
    assert make_bank(torch.ones(3, 2), "cosine").state_dict() == {}


@each_precision
def test_a_bank_that_moves_is_scanned_where_it_is(device, backend):
    generator = torch.Generator().manual_seed(24)
    features, queries = torch.randn(90, 8, generator=generator), torch.randn(4, 8, generator=generator)
    bank = make_bank(features, "cosine", backend)
    before = bank.votes(queries, 5)
    assert torch.equal(bank.to(device).votes(queries.to(device), 5).cpu(), before)


@each_backend
@both_metrics
def test_nearby_rows_are_nearly_the_nearest(device, metric, backend):
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(900, 64, generator=generator)
    queries = torch.randn(30, 64, generator=generator)
    bank = make_bank(features, metric, backend, device)
    similarities, rows = bank.nearby(queries.to(device), 40)
    distances = torch.from_numpy(true_distances(queries, features, metric))
    true = 1 - distances if metric == "cosine" else -distances.square()
    own = true.gather(1, rows.cpu())
    scale = 1 if metric == "cosine" else 200  # about the squares' size
    assert (similarities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(similarities.cpu(), own, rtol=0, atol=0.02 * scale)
    # Whatever is missing is hardly more similar than what is there.
    fortieth = true.sort(dim=1, descending=True).values[:, 39:40]
    assert (own >= fortieth - 0.04 * scale).all()
    assert all(len(set(each)) == 40 for each in rows.tolist())


@both_metrics
@pytest.mark.parametrize("stored", [False, True])
def test_combine_sums_weighted_rows(device, metric, stored):
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(50, 7, generator=generator)
    features[3] = 0
    rows = torch.tensor([[4, 3, 4, 49], [0, 1, 2, 3]])  # out of order, one of them twice
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    kept = StoredRows(7, torch.float32, None, device) if stored else features.to(device)
    if stored:
        kept.append(features)
    labels = torch.zeros(50).long().to(device)
    bank = MemoryBank(kept, labels, torch.arange(50).to(device), 1, metric)
    sums = bank.combine(rows.to(device), weights.to(device)).cpu()
    x = features.double().numpy()
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    expected = np.stack([w @ x[r] for w, r in zip(weights.numpy(), rows.numpy(), strict=True)])
    np.testing.assert_allclose(sums, expected, atol=1e-6)


@both_metrics
def test_a_bank_of_one_class(device, metric):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    bank = make_bank(features, metric, device=device)
    queries = torch.randn(4, 5, generator=torch.Generator().manual_seed(8))
    own, rows = bank.of_class(2)
    assert rows.tolist() == [row for row, label in enumerate(bank.labels.tolist()) if label == 2]
    assert own.labels.tolist() == [2] * len(rows)
    distances, found = own.search(queries.to(device), 3)
    members = rows.cpu()
    expected, places = brute_force(queries, features[members], metric, 3)
    assert rows[found].tolist() == members[torch.from_numpy(places)].tolist()
    np.testing.assert_allclose(distances.cpu(), expected, rtol=1e-12, atol=2e-12)
    with pytest.raises(ValueError, match=r"one of \[0, 1, 2, 3, 4\], but got 7"):
        bank.of_class(7)
