"""Banks on disk: the same votes, in the memory that was asked for."""

import errno

import pytest
import torch

from lightning_advknn.search import MemoryBank, StoredRows
from lightning_advknn.search.scans import torch_scan


def stored(rows, folder, device="cpu"):
    result = StoredRows(rows.shape[1], rows.dtype, folder, torch.device(device))
    for part in torch.split(rows, 7):
        result.append(part)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
def test_rows_come_back_as_they_went(tmp_path, device, dtype):
    rows = (100 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    kept = stored(rows, tmp_path / "deep", device)
    assert (len(kept), kept.shape, kept.ndim, kept.dtype) == (40, (40, 5), 2, dtype)
    for chosen in (
        slice(0, 40),
        slice(33, 99),
        slice(5, 5),
        slice(None, None, 3),
        torch.tensor([39, 0, 0, 7]),
        torch.tensor([3, 4, 5, 30, 31, 9]),
        torch.tensor([0, 1, 39]),
        torch.tensor([], dtype=torch.int64),
    ):
        found = kept[chosen]
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), rows[chosen])


def test_rows_that_follow_each_other_are_read_together_and_once(tmp_path, monkeypatch):
    kept = stored(torch.arange(40.0)[:, None].repeat(1, 5), tmp_path)
    read = []
    monkeypatch.setattr(
        StoredRows,
        "_read",
        lambda self, into, row: read.append((row, len(into))) or read_row(self, into, row),
    )
    found = kept[torch.tensor([7, 30, 6, 8, 7, 31, 2])]
    assert found[:, 3].tolist() == [7, 30, 6, 8, 7, 31, 2]
    assert read == [(2, 1), (6, 3), (30, 2)]


def test_no_file_is_left_behind(tmp_path):
    kept = stored(torch.ones(40, 5), tmp_path)
    assert list(tmp_path.iterdir()) == []  # it has no name, so that not even a killed process leaves it
    assert kept[:1].sum() == 5


def test_a_full_disk_says_what_would_help(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = StoredRows(5, torch.float32, tmp_path, torch.device("cpu"))
    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match=r"room for 40 more bytes.*No space left.*raise `memory_gib`"):
        kept.append(torch.ones(2, 5))


@pytest.mark.parametrize("backend", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_votes_from_disk_are_those_from_memory(tmp_path, device, backend, metric, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 64, "cuda": 64, "disk": 30})
    limits = torch_scan._Limits(scores=3000, product=2**20, codes=2**25)
    monkeypatch.setattr(torch_scan, "_limits", lambda device: limits)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 600, generator=generator).repeat(8, 1)
    features = (features + 0.1 * torch.randn(480, 600, generator=generator)).relu()
    queries = (features[:90] + 0.2).to(device)
    labels, ids = torch.arange(480, device=device) % 7, torch.arange(480, device=device)
    arguments = labels, ids, 7, metric, backend
    memory = MemoryBank(features.to(device), *arguments)
    disk = MemoryBank(stored(features, tmp_path, device), *arguments)
    assert torch.equal(disk.votes(queries, 12), memory.votes(queries, 12))
    assert torch.equal(disk.search(queries, 12)[1], memory.search(queries, 12)[1])
    assert torch.equal(disk.leave_one_out_votes(12), memory.leave_one_out_votes(12))
    assert disk.state_dict() == {}


def test_faiss_wants_its_bank_in_memory(tmp_path):
    pytest.importorskip("faiss")
    rows, labels, ids = torch.ones(9, 3), torch.zeros(9).long(), torch.arange(9)
    with pytest.raises(ValueError, match="a bank in memory for `backend='faiss'`"):
        MemoryBank(stored(rows, tmp_path), labels, ids, 2, "cosine", "faiss")


@pytest.mark.parametrize("backend", ["int8", "bfloat16"])
def test_rows_that_codes_cannot_tell_apart_are_not_read_one_by_one(tmp_path, monkeypatch, backend):
    generator = torch.Generator().manual_seed(3)
    # Nearer to each other than codes lose, though float32 tells them apart.
    rows = 1 + 0.03 * torch.rand(6000, 16, generator=generator)
    queries = 1 + 0.03 * torch.rand(5, 16, generator=generator)
    distances = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = distances.argsort(dim=1, stable=True)[:, :4]
    read = []
    monkeypatch.setattr(StoredRows, "_read", lambda self, *at: read.append(self) or read_row(self, *at))
    bank = MemoryBank(
        stored(rows, tmp_path), torch.arange(6000) % 9, torch.arange(6000), 9, "euclidean", backend
    )
    assert torch.equal(bank.search(queries, 4)[1], expected)
    assert len(read) < 2000  # of 5 x 6000 pairs


read_row = StoredRows._read
