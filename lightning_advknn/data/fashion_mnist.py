"""Fashion-MNIST."""

from typing import ClassVar

import torchvision

from lightning_advknn.data.mnist import MNIST


class FashionMNIST(MNIST):
    """Clothing: 60,000 training and 10,000 test images of 1x28x28, in MNIST's format, from torchvision.

    Files: ``root/FashionMNIST/raw/*-ubyte``. Arguments and splits as in `ImageDataModule`.
    """

    dataset: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.FashionMNIST
    class_names = tuple(torchvision.datasets.FashionMNIST.classes)
    md5_by_file: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
