"""Settings for small data sets."""

import pytest

from lightning_advknn.data import MNIST, SVHN, FashionMNIST

OWN = {"download": False, "verify_checksums": False}
SMALL = {"val_size": 60, "calibration_per_class": 7, **OWN}
SPLITS = ("train", "val", "calibration", "test")
IDX_FILES = [
    f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]

each_data_set = pytest.mark.parametrize(
    ("kind", "root"), [(MNIST, "mnist_root"), (FashionMNIST, "fashion_mnist_root"), (SVHN, "svhn_root")]
)


def read_whole(kind, root, **settings):
    """Check and read a data set."""
    data = kind(root=str(root), **{**SMALL, **settings})
    data.prepare_data()
    data.setup()
