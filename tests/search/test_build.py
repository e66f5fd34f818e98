"""Banks are built from batches of any kind, in the memory that was asked for."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork, LeNet5
from lightning_advknn.search import StoredRows
from lightning_advknn.search.build import BankSettings, build_banks


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
    monkeypatch.setattr("lightning_advknn.search.memory_plan._WORKING", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr("lightning_advknn.search.backends.WIDEST", 5)

    class Loader:
        dataset, batch_size = range(100), 4

        def __iter__(self):
            yield Batch(torch.rand(4, 1, 28, 28), torch.zeros(4).long(), torch.arange(4))
            pytest.fail("the first batch tells")

    network = FeatureNetwork(LeNet5(), ["relu2"]).eval()
    settings = BankSettings(backend=backend, memory_gib=60000 / 2**30, folder=tmp_path)
    with pytest.raises(ValueError, match=error):
        build_banks(network, Loader(), 2, settings)


def test_build_banks_keeps_what_fits_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.memory_plan._WORKING", {"cpu": 0, "cuda": 0})
    network = FeatureNetwork(LeNet5(), ["relu2", "relu3", "logits"]).eval()
    images = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    loader = [
        Batch(part, torch.zeros(len(part)).long(), torch.arange(len(part))) for part in images.split(20)
    ]
    whole = build_banks(network, loader, 2)
    halved = build_banks(network, loader, 2, BankSettings(memory_gib=60000 / 2**30, folder=tmp_path))
    assert [isinstance(bank.features, StoredRows) for bank in halved.values()] == [True, False, False]
    for layer, bank in whole.items():
        assert torch.equal(bank.features, halved[layer].features[:])
        assert torch.equal(bank.votes(bank.features, 5), halved[layer].votes(bank.features, 5))


def test_banks_without_a_limit_go_to_disk_where_a_gpu_is_full(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_advknn.search.memory_plan._WORKING", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr("lightning_advknn.search.memory_plan._free_gib", lambda device: 60000 / 2**30)
    network = FeatureNetwork(LeNet5(), ["relu2", "logits"]).to(device).eval()
    images = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    batches = [Batch(images, torch.arange(50) % 2, torch.arange(50))]
    banks = build_banks(network, batches, 2, BankSettings(folder=tmp_path))
    full = device.type == "cuda"
    assert [isinstance(bank.features, StoredRows) for bank in banks.values()] == [full, False]
    assert ("Banks of relu2 are kept on disk" in capsys.readouterr().err) == full
    whole = build_banks(network, batches, 2, BankSettings(memory_gib=100.0))
    for layer, features in network.features(images.to(device)).items():
        features = features.detach()
        assert torch.equal(banks[layer].votes(features, 5), whole[layer].votes(features, 5))


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import BankSettings, build_banks
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
settings = BankSettings(memory_gib=0.635, folder=Path(sys.argv[1]))
bank = build_banks(network, Loader(), 10, settings)["relu"]
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


@pytest.fixture
def network():
    return FeatureNetwork(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), ["0", "1"]).eval()


def make_batches(sizes):
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(sum(sizes), 1, 2, 2, generator=generator)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    parts = zip(*(part.split(sizes) for part in (images, labels, torch.arange(sum(sizes)) + 7)), strict=True)
    return [Batch(*part) for part in parts]


class Announced:
    """Batches of announced sizes, that can be read once."""

    def __init__(self, batches, sizes):
        self.sizes, self.remaining = sizes, iter(batches)

    def __iter__(self):
        return self.remaining


@pytest.mark.parametrize("kind", ["list", "generator", "announced", "loader"])
def test_batches_of_any_kind_give_the_same_banks(network, kind):
    batches = make_batches([4, 4, 3])
    images, labels, ids = (torch.cat(part) for part in zip(*batches, strict=True))
    given = {
        "list": batches,
        "generator": iter(batches),
        "announced": Announced(batches, [4, 4, 3]),
        "loader": DataLoader(
            TensorDataset(images, labels, ids),
            batch_size=4,
            collate_fn=lambda rows: Batch(*map(torch.stack, zip(*rows, strict=True))),
        ),
    }
    banks = build_banks(network, given[kind], 3)
    torch.testing.assert_close(banks["0"].features, images.flatten(1))
    torch.testing.assert_close(banks["1"].features, network.network(images))
    for bank in banks.values():
        assert torch.equal(bank.labels, labels)
        assert torch.equal(bank.ids, ids)
        assert bank.image_shape == (1, 2, 2)


def test_classes_are_those_seen_unless_told_otherwise(network):
    (batch,) = make_batches([5])
    batch = batch._replace(labels=torch.tensor([0, 4, 1, 1, 0]))
    assert build_banks(network, [batch])["0"].num_classes == 5
    assert build_banks(network, [batch], 9)["0"].num_classes == 9


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 4, 4], r"Expected 4 images in batch 2 of the training images, but got 3"),
        ([4, 4, 3, 2], r"Expected 2 images in batch 3 of the training images, but got none"),
        ([4, 4], r"Expected no images in batch 2 of the training images, but got 3"),
    ],
)
def test_batches_that_are_not_as_announced_are_refused(network, sizes, message):
    # Rows of batches that do not come would be whatever the memory held.
    with pytest.raises(ValueError, match=message):
        build_banks(network, Announced(make_batches([4, 4, 3]), sizes))


def test_a_loader_that_drops_images_is_refused(network):
    images, labels, ids = (torch.cat(part) for part in zip(*make_batches([4, 4, 3]), strict=True))
    loader = DataLoader(
        TensorDataset(images, labels, ids),
        batch_size=4,
        drop_last=True,
        collate_fn=lambda rows: Batch(*map(torch.stack, zip(*rows, strict=True))),
    )
    with pytest.raises(ValueError, match="Expected 3 images in batch 2 of the training images, but got none"):
        build_banks(network, loader)


@pytest.mark.parametrize("batches", [[], Announced([], []), Announced([], [0])])
def test_no_images_are_refused(network, batches):
    with pytest.raises(ValueError, match="Expected training images for the bank, but got none"):
        build_banks(network, batches)
