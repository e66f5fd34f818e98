"""Votes on a bank's own rows, without themselves."""

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank
from tests.search.oracle import both_metrics, brute_force, check, each_backend, each_precision, make_bank


@each_backend
@both_metrics
def test_leave_one_out_by_hand(device, metric, backend):
    # Points on a circle at 0, 10, 20, 30 degrees and so on: neighbours by angle, for either metric.
    #
    # query (row, id)      all rows, k = 3    without its own
    # 0 at  0 deg (id 7)   0, 1, 2            1, 2, 3
    # 2 at 20 deg (id 5)   2, 1, 4            1, 4, 3     (4 lies at 26 deg, 3 at 33)
    # a stranger at 2 deg  0, 1, 2            0, 1, 2     (id 99 is not in the bank)
    degrees = torch.tensor([0.0, 11, 20, 33, 26])
    ids = torch.tensor([7, 3, 5, 1, 8])
    features = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], 1)
    angles = torch.tensor([0.0, 20, 2]).deg2rad()
    queries = torch.stack([angles.cos(), angles.sin()], 1)
    bank = MemoryBank(features, torch.tensor([0, 1, 2, 1, 0]), ids, 3, metric, backend).to(device)
    queries, own = queries.to(device), torch.tensor([7, 5, 99], device=device)
    assert bank.search(queries, 3)[1].tolist() == [[0, 1, 2], [2, 4, 1], [0, 1, 2]]
    assert bank.search(queries, 3, own)[1].tolist() == [[1, 2, 4], [4, 1, 3], [0, 1, 2]]
    assert bank.votes(queries, 3, own).tolist() == [[1, 1, 1], [1, 2, 0], [1, 1, 1]]


@each_backend
@both_metrics
@pytest.mark.parametrize("kind", ["random", "clusters", "grid", "copies", "zeros", "all the rest"])
def test_leave_one_out_of_every_row(device, metric, backend, kind, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.scans.torch_scan._WIDE", 1)
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("lightning_advknn.search.scans.self_scan._SAMPLE", 60)
    generator = torch.Generator().manual_seed(10)
    rows, k = (60, 59) if kind == "all the rest" else (250, 12)
    features = torch.randn(rows, 6, generator=generator)
    if kind == "clusters":
        features = features.repeat(3, 1) + 0.05 * torch.randn(3 * rows, 6, generator=generator)
        rows *= 3
    if kind == "grid":
        features = torch.randint(1, 3, (rows, 3), generator=generator).float()
    if kind == "copies":  # more of them than a row may have candidates
        features[50:] = features[0]
    if kind == "zeros":  # at distance 1 from all; with neighbours on either side
        features[::5] = 0
        features[1::2] *= -1
    ids = torch.randperm(1000, generator=generator)[:rows]
    bank = make_bank(features, metric, backend, device, ids=ids)
    expected = brute_force(features, features, metric, k, own=np.arange(rows))
    check(bank, features, k, *expected, own_ids=ids.to(device))
    assert torch.equal(bank.leave_one_out_votes(k), bank.votes(bank.features, k, bank.ids))


@each_precision
@pytest.mark.parametrize("wrong", [0.0, 2.0])
def test_leave_one_out_by_any_threshold(device, backend, wrong, monkeypatch):
    """A sample that misleads: thresholds that nothing, or everything, exceeds."""
    monkeypatch.setattr("lightning_advknn.search.scans.torch_scan._WIDE", 1)
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 64, "cuda": 64})
    for name, value in (("_SPARE", wrong * 100), ("_SAMPLE", 100), ("_MOST", 2)):
        monkeypatch.setattr(f"lightning_advknn.search.scans.self_scan.{name}", value)
    generator = torch.Generator().manual_seed(27)
    features = torch.randn(40, 9, generator=generator).repeat(10, 1)
    features += 0.3 * torch.randn(400, 9, generator=generator)
    bank = make_bank(features, "cosine", backend, device)
    rows = brute_force(features, features, "cosine", 7, own=np.arange(400))[1]
    labels = bank.labels.cpu()[torch.from_numpy(rows)]
    expected = [row.bincount(minlength=5).tolist() for row in labels]
    assert bank.leave_one_out_votes(7).tolist() == expected


@both_metrics
def test_a_row_votes_for_itself_unless_left_out(device, metric):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(11))
    bank = make_bank(features, metric, device=device)
    own = torch.arange(50)
    assert bank.search(features.to(device), 1)[1].flatten().tolist() == own.tolist()
    assert not (bank.search(features.to(device), 49, own.to(device))[1].cpu() == own[:, None]).any()


@each_backend
@both_metrics
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_leave_one_out_at_any_scale(device, metric, backend, scale):
    features = scale * torch.randn(60, 8, generator=torch.Generator().manual_seed(17))
    bank = make_bank(features, metric, backend, device)
    rows = brute_force(features, features, metric, 9, own=np.arange(60))[1]
    own = torch.arange(60, device=device)
    assert bank.search(features.to(device), 9, own)[1].tolist() == rows.tolist()


@each_backend
@both_metrics
@pytest.mark.parametrize("rows", [2, 9])
def test_a_row_does_not_vote_for_itself_where_arithmetic_overflows(device, metric, backend, rows):
    # All but the first have one label, so that nobody need know which of them are nearest.
    features = 1e38 * torch.rand(rows, 3, generator=torch.Generator().manual_seed(29))
    labels, ids = (torch.arange(rows) > 0).long(), torch.arange(rows)
    bank = MemoryBank(features, labels, ids, 2, metric, backend).to(device)
    queries, own = features.to(device), ids.to(device)
    everyone_else = [[0, rows - 1]] + [[1, rows - 2]] * (rows - 1)
    assert bank.votes(queries, rows - 1, own).tolist() == everyone_else
    assert bank.leave_one_out_votes(rows - 1).tolist() == everyone_else


def test_leaving_one_out_leaves_one_row_fewer():
    bank = make_bank(torch.ones(8, 2), "cosine")
    own = torch.tensor([0])
    assert bank.search(torch.ones(1, 2), 7, own)[1].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"\[1, 7\] \(the bank's rows less the image's own\), but got 8"):
        bank.search(torch.ones(1, 2), 8, own)


def test_leaving_one_out_leaves_out_all_rows_of_an_image():
    bank = make_bank(torch.eye(5), "euclidean", ids=torch.tensor([3, 1, 3, 3, 2]))
    own = torch.tensor([3, 1])
    assert bank.search(torch.eye(5)[:2], 2, own)[1].tolist() == [[1, 4], [0, 2]]
    for refused in (lambda: bank.votes(torch.eye(5)[:2], 3, own), lambda: bank.leave_one_out_votes(3)):
        with pytest.raises(ValueError, match=r"\[1, 2\] \(the bank's rows less the image's own\), but got 3"):
            refused()
