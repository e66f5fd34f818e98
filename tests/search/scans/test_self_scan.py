"""Bounds of the pairs of a bank's own rows hold."""

import torch

from lightning_advknn.search.scans import torch_scan
from lightning_advknn.search.scans.self_scan import candidates_of_all
from tests.search.oracle import make_bank, true_similarities


def test_pairs_of_leave_one_out_have_bounds_that_hold(device, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.scans.self_scan._SAMPLE", 100)
    features = (torch.randn(500, 64, generator=torch.Generator().manual_seed(28)) + 0.3).relu()
    bank = make_bank(features, "cosine", "int8", device)
    true = true_similarities(features, features, "cosine")
    start = 0
    for found in candidates_of_all(bank._scanner(), bank.norms, 40, 128):
        of_step = true[start : start + 128]
        real = (found.upper > -torch.inf).cpu()
        of_found = of_step.gather(1, found.indices.cpu())
        assert (found.lower.cpu() <= of_found)[real].all()
        assert (of_found <= found.upper.cpu())[real].all()
        unseen = of_step.scatter(
            1, found.indices.cpu(), -torch.inf
        )  # padding points at row 0, a candidate or not
        unseen[:, 0] = -torch.inf
        assert (unseen <= found.unseen.cpu()).all()
        assert 20 < real.sum(1).float().mean() < 120
        assert all(
            len(set(row[there])) == there.sum()
            for row, there in zip(found.indices.cpu().numpy(), real.numpy(), strict=True)
        )
        start += 128
    assert start >= 500


def test_a_bank_wider_than_memory_is_compared_in_blocks(device, monkeypatch):
    features = (torch.randn(700, 512, generator=torch.Generator().manual_seed(29)) + 0.3).relu()
    whole = list(candidates_of_all(*_scanned(features, device), 40, 64))
    held = []
    limits = torch_scan._Limits(scores=2 * 64 * 64, product=2**20, codes=2**25)
    monkeypatch.setattr(torch_scan, "_limits", lambda device: limits)
    scores = torch_scan.TorchScan.scores
    monkeypatch.setattr(torch_scan.TorchScan, "scores", lambda *given: held.append(given) or scores(*given))
    parts = list(candidates_of_all(*_scanned(features, device), 40, 64))
    # A block of two steps' rows at most; the sample of the thresholds is all rows here.
    assert max(rows.stop - rows.start for _, _, rows in held[11:]) == 128
    for one, other in zip(whole, parts, strict=True):
        for mine, theirs in zip(one.by_row(), other.by_row(), strict=True):
            assert torch.equal(mine, theirs)


def _scanned(features, device):
    bank = make_bank(features, "cosine", "int8", device)
    return bank._scanner(), bank.norms
