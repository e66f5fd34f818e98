"""Fixtures for all tests: devices to run on, and tiny data sets in the official file formats."""

import gzip
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import nn

from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import BankSettings, build_banks

TRAIN_IMAGES, TEST_IMAGES = 300, 400

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads than cores wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker ends with one while the other has nothing left."""
    items.sort(key=lambda item: item.path.name != "test_pretended_gpus.py")


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:  # what is made on the first one by mistake is found
        return ["cpu", f"cuda:{count - 1}"]
    return ["cpu", "cuda"][: 1 + count]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the last GPU if there is one; a test that takes this runs on both."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny MNIST files; use with ``verify_checksums=False, download=False``."""
    return _write_idx_files(tmp_path_factory.mktemp("mnist"), "MNIST", seed=1)


@pytest.fixture(scope="session")
def fashion_mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny Fashion-MNIST files; use with ``verify_checksums=False, download=False``."""
    return _write_idx_files(tmp_path_factory.mktemp("fashion_mnist"), "FashionMNIST", seed=2)


@pytest.fixture(scope="session")
def svhn_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny SVHN files; use with ``verify_checksums=False, download=False``."""
    root = tmp_path_factory.mktemp("svhn")
    for seed, (file, n) in enumerate((("train_32x32.mat", TRAIN_IMAGES), ("test_32x32.mat", TEST_IMAGES))):
        images, labels = _learnable(n, (32, 32, 3), pattern_seed=3, seed=seed)
        # As in the official files: images last, labels 1 to 10, where 10 is the digit 0.
        content = {
            "X": images.transpose(1, 2, 3, 0),
            "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None],
        }
        scipy.io.savemat(root / file, content)
    return root


@pytest.fixture(scope="session")
def kmnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny KMNIST files, and their archives; use with ``verify_checksums=False, download=False``."""
    root = _write_idx_files(tmp_path_factory.mktemp("kmnist"), "KMNIST", seed=4)
    for path in list((root / "KMNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return root


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny CIFAR-10 files; use with ``verify_checksums=False, download=False``."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    training, labels = _learnable(TRAIN_IMAGES, (32, 32, 3), pattern_seed=5, seed=0)
    parts = [(f"data_batch_{i + 1}", training[i::5], labels[i::5]) for i in range(5)]
    for name, images, own in (*parts, ("test_batch", *_learnable(TEST_IMAGES, (32, 32, 3), 5, 1))):
        # As in the official files: a row an image, its channels one after the other.
        content = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": own.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return root


@pytest.fixture(scope="session")
def gtsrb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with tiny GTSRB files: 43 classes of 3 tracks of 4 frames, 8 test images each; use as the others."""
    root = tmp_path_factory.mktemp("gtsrb")
    base = root / "gtsrb"
    rng = np.random.default_rng(6)
    patterns = rng.random((43, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)

    def write(path: Path, label: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = 0.6 * patterns[label] + 0.4 * rng.random((32, 32, 3))
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)

    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(43):
        for track in range(3):
            for frame in range(4):
                write(base / "GTSRB" / "Training" / f"{label:05d}" / f"{track:05d}_{frame:05d}.ppm", label)
    for number, label in enumerate(rng.permutation(np.arange(43 * 8) % 43).tolist()):
        write(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", label)
        lines.append(f"{number:05d}.ppm;32;32;5;5;27;27;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return root


def _learnable(n: int, shape: tuple[int, ...], pattern_seed: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(n, *shape)`` of a blocky pattern a class plus noise, and labels uint8 ``(n,)``.

    Classes are equally frequent.
    """
    patterns = np.random.default_rng(pattern_seed).random((10, shape[0] // 4, shape[1] // 4, *shape[2:]))
    patterns = patterns.repeat(4, axis=1).repeat(4, axis=2)
    rng = np.random.default_rng([pattern_seed, seed])
    labels = rng.permutation(np.arange(n) % 10)
    images = 0.6 * patterns[labels] + 0.4 * rng.random((n, *shape))
    return (images * 255).round().astype(np.uint8), labels.astype(np.uint8)


def _write_idx_files(root: Path, name: str, seed: int) -> Path:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, (prefix, n) in enumerate((("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES))):
        images, labels = _learnable(n, (28, 28), pattern_seed=seed, seed=part)
        # Big-endian header: two zero bytes, type 8 (uint8), number of dimensions, then the dimensions.
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28) + images.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">BBBBI", 0, 0, 8, 1, n) + labels.tobytes()
        )
    return root


@pytest.fixture
def hand_dknn(device: torch.device) -> DkNN:
    """A DkNN small enough to work by hand: points (x, y) as 1x1x2 images, k = 3, Euclidean.

    Layer ``both`` passes (x, y) on, layer ``height`` gives y alone, and the network's class is 0 below y = .5,
    2 above. The bank's rows:

    ====  ==========  =====
    row   (x, y)      label
    ====  ==========  =====
    0     (0, 0)      0
    1     (.1, 0)     0
    2     (.2, 1)     1
    3     (1, 0)      1
    4     (.9, 1)     2
    5     (1, 1)      2
    ====  ==========  =====
    """
    network = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(), both=nn.Linear(2, 2), height=nn.Linear(2, 1), logits=nn.Linear(1, 3)
        )
    )
    state = {
        "both.weight": [[1, 0], [0, 1]],
        "both.bias": [0, 0],
        "height.weight": [[0, 1]],
        "height.bias": [0],
        "logits.weight": [[-2], [0], [2]],
        "logits.bias": [1, -9, -1],
    }
    network.load_state_dict({name: torch.tensor(values).float() for name, values in state.items()})
    features = FeatureNetwork(network, ["both", "height"]).eval().to(device)
    images = torch.tensor([[0, 0], [0.1, 0], [0.2, 1], [1, 0], [0.9, 1], [1, 1]])[:, None, None]
    labels, ids = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(10, 16)
    banks = build_banks(features, [Batch(images, labels, ids)], 3, BankSettings("euclidean"))
    return DkNN.on_banks(features, banks, k=3).to(device)


@pytest.fixture
def plane_knn(device: torch.device) -> Callable[..., DkNN]:
    """Makes a Euclidean kNN on pixels, as a DkNN of one layer, of 1x1x2 images: ``plane_knn(rows (x, y, label), k)``."""

    def make(rows: Sequence[tuple[float, float, int]], k: int) -> DkNN:
        network = nn.Sequential(OrderedDict(pixels=nn.Flatten(), logits=nn.Linear(2, 3)))
        features = FeatureNetwork(network, ["pixels"]).eval().to(device)
        images = torch.tensor([row[:2] for row in rows])[:, None, None].float()
        labels = torch.tensor([row[2] for row in rows])
        batch = Batch(images, labels, torch.arange(len(rows)))
        banks = build_banks(features, [batch], int(labels.max()) + 1, BankSettings("euclidean"))
        return DkNN.on_banks(features, banks, k)

    return make
