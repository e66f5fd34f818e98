"""Banks on disk: the same votes, in the memory that was asked for."""

import errno
import subprocess
import sys

import pytest
import torch

from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork, LeNet5
from lightning_advknn.search import MemoryBank, StoredRows, in_memory
from lightning_advknn.search.build import build_banks


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
    ):
        found = kept[chosen]
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), rows[chosen])


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
    monkeypatch.setattr("lightning_advknn.search.scans.torch_scan._HELD", {"cpu": 3000, "cuda": 3000})
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


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("faiss", "a bank in memory for `backend='faiss'`"),
        ("int8", "at most 5 features for `backend='int8'`"),
    ],
)
def test_what_no_backend_can_do_is_refused_at_the_first_batch(tmp_path, monkeypatch, backend, error):
    if backend == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr("lightning_advknn.search.stored_rows._WORKING", 0)
    monkeypatch.setattr("lightning_advknn.search.bank.WIDEST", 5)

    class Loader:
        dataset, batch_size = range(100), 4

        def __iter__(self):
            yield Batch(torch.rand(4, 1, 28, 28), torch.zeros(4).long(), torch.arange(4))
            pytest.fail("the first batch tells")

    network = FeatureNetwork(LeNet5(), ["relu2"]).eval()
    with pytest.raises(ValueError, match=error):
        build_banks(network, Loader(), 2, backend=backend, memory_gib=60000 / 2**30, folder=tmp_path)


def test_the_smallest_banks_stay_in_memory():
    # 60,000 rows of 10, 1152, 6272 and 12544 float32 features, and as many bytes again for codes: 3 MB, 346 MB,
    # 1.9 GB and 3.8 GB.
    widths = {"relu1": 12544, "relu2": 6272, "relu3": 1152, "logits": 10}
    assert in_memory(60000, widths, 8) == set(widths)
    assert in_memory(60000, widths, 4) == {"relu2", "relu3", "logits"}
    assert in_memory(60000, widths, 1.2) == {"relu3", "logits"}
    assert in_memory(60000, widths, 0.7) == {"logits"}
    with pytest.raises(
        ValueError, match=r"`memory_gib` to be at least 0\.6\d to search .* 60000 rows .* but got 0\.25"
    ):
        in_memory(60000, widths, 0.25)


def test_memory_counts_what_backends_keep_beside_the_rows():
    # 60,000 rows of 1000 features: 240 MB, beside 671 for searches.
    for backend, bytes_of_a_feature in (
        ("float32", 4),
        ("int8", 5),
        ("bfloat16", 6),
        ("auto", 6),
        ("faiss", 12),
    ):
        gib = (671.09e6 + 60000 * (120 + 1000 * bytes_of_a_feature)) / 2**30
        assert in_memory(60000, {"relu": 1000}, 1.001 * gib, backend) == {"relu"}
        assert in_memory(60000, {"relu": 1000}, 0.999 * gib, backend) == set()


def test_build_banks_keeps_what_fits_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.stored_rows._WORKING", 0)
    network = FeatureNetwork(LeNet5(), ["relu2", "relu3", "logits"]).eval()
    images = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    loader = [
        Batch(part, torch.zeros(len(part)).long(), torch.arange(len(part))) for part in images.split(20)
    ]
    whole = build_banks(network, loader, 2)
    halved = build_banks(network, loader, 2, memory_gib=60000 / 2**30, folder=tmp_path)
    assert [isinstance(bank.features, StoredRows) for bank in halved.values()] == [True, False, False]
    for layer, bank in whole.items():
        assert torch.equal(bank.features, halved[layer].features[:])
        assert torch.equal(bank.votes(bank.features, 5), halved[layer].votes(bank.features, 5))


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

PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from lightning_advknn.classifiers import build_banks
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
rows, width = 40000, 4096  # 655 MB
network = nn.Sequential()
network.add_module("flatten", nn.Flatten())
network.add_module("relu", nn.Sequential(nn.Linear(9, width), nn.ReLU()))
network.add_module("logits", nn.Linear(width, 10))
network = FeatureNetwork(network, ["relu"]).eval()
class Loader:
    dataset, batch_size = range(rows), 1000
    def __iter__(self):
        for start in range(0, rows, 1000):
            yield Batch(torch.rand(1000, 1, 3, 3), torch.arange(1000) % 10, torch.arange(start, start + 1000))
torch.manual_seed(0)
def peak():  # in KiB; `ru_maxrss` would begin at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
bank = build_banks(network, Loader(), 10, memory_gib=0.635, folder=Path(sys.argv[1]))["relu"]
extracted = peak() - before
bank.votes(network.features(torch.rand(300, 1, 3, 3))["relu"], 75)
print(type(bank.features).__name__, extracted / 2**10, (peak() - before) / 2**10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bank_on_disk_takes_no_more_memory_than_stated(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    kind, extracted, peak = said.split()
    assert kind == "StoredRows"
    assert float(extracted) < 200  # MiB: a batch is 16, and 16 more with what comes before the ReLU
    assert float(peak) < 0.635 * 1024  # MiB, as `in_memory` reckons; the bank and its codes are 780
