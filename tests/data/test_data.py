"""Splits and batches, against the bytes of the files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from pytorch_lightning import seed_everything

from lightning_advknn.data import MNIST, SVHN, Batch, Digits, FashionMNIST
from lightning_advknn.data.splits import ImageSplit
from tests.data.small import SMALL, SPLITS, each_data_set, read_whole

REAL = Path(__file__).parents[3] / "shared" / "data"


def original(kind, root, train):
    """Images ``(n, channels, H, W)`` and labels of one split, read from the bytes."""
    if kind is SVHN:
        content = scipy.io.loadmat(root / f"{'train' if train else 'test'}_32x32.mat")
        return content["X"].transpose(3, 2, 0, 1), content["y"].flatten() % 10
    raw, prefix = root / kind.__name__ / "raw", "train" if train else "t10k"
    images = np.frombuffer((raw / f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((raw / f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images.reshape(-1, 1, 28, 28), labels


@each_data_set
def test_splits_are_disjoint_whole_and_hold_the_files_images(kind, root, request):
    root = request.getfixturevalue(root)
    data = kind(root=str(root), **SMALL)
    data.prepare_data()
    data.setup()
    ids = {name: data.split(name).ids.tolist() for name in SPLITS}
    assert {name: len(rows) for name, rows in ids.items()} == {
        "train": 240, "val": 60, "calibration": 70, "test": 330,
    }  # fmt: skip
    assert sorted(ids["train"] + ids["val"]) == list(range(300))
    assert sorted(ids["calibration"] + ids["test"]) == list(range(400))
    assert all(rows == sorted(rows) for rows in ids.values())
    for name in SPLITS:
        images, labels = original(kind, root, train=name in ("train", "val"))
        split = data.split(name)
        assert np.array_equal(split.images.numpy(), images[ids[name]])
        assert split.labels.tolist() == labels[ids[name]].tolist()
        assert split.labels.dtype == torch.int64
    assert data.split("calibration").labels.bincount().tolist() == [7] * 10
    assert data.name == kind.__name__
    assert data.split("train").images.shape[1:] == kind.image_shape


@each_data_set
def test_batches_hold_floats_in_the_unit_interval(kind, root, request):
    root = request.getfixturevalue(root)
    data = kind(root=str(root), batch_size=50, eval_batch_size=100, **SMALL)
    for loader, train in ((data.train_dataloader(), True), (data.loader("test"), False)):
        images, labels = original(kind, root, train)
        for batch in loader:
            assert isinstance(batch, Batch)
            assert batch.images.dtype == torch.float32
            assert batch.labels.dtype == batch.ids.dtype == torch.int64
            assert 0 <= batch.images.min() < 0.1
            assert 0.9 < batch.images.max() <= 1
            np.testing.assert_allclose(batch.images, images[batch.ids] / 255, rtol=0, atol=1e-7)
            assert batch.labels.tolist() == labels[batch.ids].tolist()
    assert [len(batch.ids) for batch in data.train_dataloader()] == [50, 50, 50, 50, 40]
    assert [len(batch.ids) for batch in data.loader("test")] == [100, 100, 100, 30]
    single = data.split("val")[3]
    assert torch.equal(single.images, data.split("val").images[3] / 255)


def test_every_byte_is_the_nearest_float(device):
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    split = ImageSplit(pixels, torch.arange(4), torch.arange(4) + 7).on(device)
    batch = split.__getitems__([3, 0, 1, 2])
    expected = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(4, 1, 8, 8)[[3, 0, 1, 2]]
    assert {part.device.type for part in batch} == {device.type}
    assert np.array_equal(batch.images.cpu().numpy(), expected)
    assert batch.ids.tolist() == [10, 7, 8, 9]


def test_batches_are_the_same_wherever_the_images_are(device):
    data = Digits()
    for name in ("train", "test"):
        for here, there in zip(data.loader(name), data.loader(name, device), strict=True):
            assert there.images.device.type == there.labels.device.type == device.type
            assert all(torch.equal(mine, other.cpu()) for mine, other in zip(here, there, strict=True))
    # Copied once, and never the images that are hashed or split further.
    split = data.split("train")
    assert split.on(device) is split.on(device)
    assert split.on(device).on(device) is split.on(device)
    assert split.images.device.type == split.labels.device.type == "cpu"


def test_images_that_fill_a_gpu_stay_where_they_are(monkeypatch):
    split, gpu = Digits().split("train"), torch.device("cuda")
    memory = SimpleNamespace(total_memory=32 * split.images.nbytes - 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    assert split.on(gpu) is split


def test_evaluation_loaders_keep_the_order_of_ids(mnist_root):
    data = MNIST(root=str(mnist_root), eval_batch_size=64, **SMALL)
    for loader, name in (
        (data.val_dataloader(), "val"), (data.test_dataloader(), "test"), (data.loader("train"), "train"),
    ):  # fmt: skip
        assert torch.cat([batch.ids for batch in loader]).tolist() == data.split(name).ids.tolist()


def test_splits_depend_on_their_seed_and_on_nothing_else(mnist_root):
    def splits(seed, global_seed):
        seed_everything(global_seed, verbose=False)
        data = MNIST(root=str(mnist_root), split_seed=seed, **SMALL)
        return [data.split(name).ids.tolist() for name in SPLITS], data.fingerprint

    assert splits(0, 1) == splits(0, 2)
    others = [splits(seed, 1) for seed in range(3)]
    for position in range(4):
        assert len({tuple(ids[position]) for ids, _ in others}) == 3
    assert len({fingerprint for _, fingerprint in others}) == 3


def test_the_fingerprint_sees_one_pixel(mnist_root, mnist_copy):
    def fingerprint(root):
        return MNIST(root=str(root), **SMALL).fingerprint

    assert fingerprint(mnist_root) == fingerprint(mnist_copy)
    file = mnist_copy / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[16 + 784 * 200 + 9] ^= 1
    file.write_bytes(content)
    assert fingerprint(mnist_root) != fingerprint(mnist_copy)


def test_training_order_depends_on_the_seed_and_the_epoch_only(mnist_root):
    data = MNIST(root=str(mnist_root), **SMALL)

    def order(seed, epoch, draws=0):
        seed_everything(seed, verbose=False)
        torch.rand(draws)  # random numbers that an interrupted run has drawn
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.ids for batch in loader]).tolist()

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 50) for epoch in (0, 1, 2)}
    assert all(orders[seed, epoch] == order(seed, epoch, draws=5) for seed, epoch in orders)
    assert len({tuple(ids) for ids in orders.values()}) == 6
    for ids in orders.values():
        assert sorted(ids) == data.split("train").ids.tolist()
        assert ids != sorted(ids)


def test_digits_are_all_there(device):
    data = Digits()
    data.prepare_data()
    data.setup()
    assert {name: len(data.split(name)) for name in SPLITS} == {
        "train": 850, "val": 150, "calibration": 250, "test": 547,
    }  # fmt: skip
    assert data.split("calibration").labels.bincount().tolist() == [25] * 10
    # The four splits together are scikit-learn's 1797 digits, enlarged.
    from sklearn.datasets import load_digits

    labels = torch.cat([data.split(name).labels for name in SPLITS])
    assert labels.bincount().tolist() == np.bincount(load_digits().target).tolist()
    images = torch.cat([data.split(name).images for name in SPLITS])
    assert images.shape == (1797, 1, 28, 28)
    assert images.dtype == torch.uint8
    # Bilinear enlargement by 3.5 keeps the mean (values are 0 to 16) except for the border.
    means = images.double().mean((1, 2, 3)).sort().values / 255
    expected = torch.from_numpy(load_digits().images).mean((1, 2)).sort().values / 16
    torch.testing.assert_close(means, expected, rtol=0, atol=0.02)
    assert len(images.flatten(1).unique(dim=0)) == len(np.unique(load_digits().data, axis=0))


def test_digits_split_by_seed():
    assert Digits().fingerprint == Digits().fingerprint
    assert Digits().fingerprint != Digits(split_seed=1).fingerprint


def test_calibration_larger_than_a_class(mnist_root):
    read_whole(MNIST, mnist_root, calibration_per_class=39)
    for size in (40, 75):
        with pytest.raises(
            ValueError,
            match=rf"`calibration_per_class` to be below 40 \(test images of class 0\), but got {size}",
        ):
            read_whole(MNIST, mnist_root, calibration_per_class=size)


def test_val_size_beyond_the_training_split(mnist_root):
    read_whole(MNIST, mnist_root, val_size=299)
    for size in (300, 5000):
        with pytest.raises(ValueError, match=rf"`val_size` to be below 300 .* but got {size}"):
            read_whole(MNIST, mnist_root, val_size=size)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "val_size", "calibration_per_class"])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, SVHN, Digits])
def test_sizes_below_one(kind, name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be at least 1, but got 0"):
        kind(**{name: 0})


def test_defaults_are_the_papers():
    data = MNIST()
    assert (data.val_size, data.calibration_per_class, data.batch_size) == (5000, 75, 128)
    assert data.verify_checksums


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_official_files(kind):
    if not (REAL / kind.__name__).is_dir():
        pytest.skip(f"needs {REAL}")
    data = kind(root=str(REAL), download=False)
    data.prepare_data()
    data.setup()
    assert {name: len(data.split(name)) for name in SPLITS} == {
        "train": 55_000, "val": 5_000, "calibration": 750, "test": 9_250,
    }  # fmt: skip
    # Known facts: Fashion-MNIST has 6000 training images of each class; MNIST's first labels are 5 0 4 1 9.
    images, labels = data.load(train=True)
    if kind is FashionMNIST:
        assert labels.bincount().tolist() == [6000] * 10
    else:
        assert labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert (images.double().mean() / 255).item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, SVHN])
def test_a_failing_download_names_the_remedy(kind, tmp_path, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise RuntimeError("Error downloading")

    base = torchvision.datasets.SVHN if kind is SVHN else kind.dataset
    monkeypatch.setattr(base, "download", no_network)
    with pytest.raises(OSError, match=r"to download .* but: Error downloading\. Put the files there by hand"):
        kind(str(tmp_path)).prepare_data()


def test_files_that_are_there_are_not_downloaded_again_but_checked(mnist_copy, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    MNIST(str(mnist_copy), verify_checksums=False).prepare_data()
    images = mnist_copy / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="official MD5"):
        MNIST(str(mnist_copy)).prepare_data()


def test_splits_are_shared_by_those_that_are_made_alike(monkeypatch):
    first, alike, other = Digits(), Digits(batch_size=7, eval_batch_size=9), Digits(split_seed=1)
    expected = Digits(split_seed=1).fingerprint
    assert first.fingerprint != expected
    for data in (alike, other):
        data.share(first)
    monkeypatch.setattr(alike, "load", lambda train: pytest.fail("read again"))
    assert alike.split("train") is first.split("train")
    assert alike.fingerprint == first.fingerprint
    assert other.fingerprint == expected
