"""One DataModule for each data set: images in [0, 1], fixed splits."""

from lightning_advknn.data.base import ImageDataModule, MissingDataError, data_of
from lightning_advknn.data.cifar10 import CIFAR10
from lightning_advknn.data.digits import Digits
from lightning_advknn.data.fashion_mnist import FashionMNIST
from lightning_advknn.data.gtsrb import GTSRB
from lightning_advknn.data.image_folder import ImageFolder
from lightning_advknn.data.kmnist import KMNIST
from lightning_advknn.data.mnist import MNIST
from lightning_advknn.data.splits import Batch
from lightning_advknn.data.svhn import SVHN

__all__ = [
    "CIFAR10",
    "GTSRB",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Batch",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "MissingDataError",
    "data_of",
]
