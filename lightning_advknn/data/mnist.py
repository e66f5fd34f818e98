"""MNIST."""

from pathlib import Path
from typing import ClassVar

import torchvision
from torch import Tensor

from lightning_advknn.data.base import ImageDataModule


class MNIST(ImageDataModule):
    """Handwritten digits: 60,000 training and 10,000 test images of 1x28x28, from torchvision.

    Files: ``root/MNIST/raw/*-ubyte``. Arguments and splits as in `ImageDataModule`.
    """

    image_shape = (1, 28, 28)
    dataset: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.MNIST
    md5_by_file: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def prepare_data(self) -> None:
        """Download missing files, if `download` is set, and check all files."""
        files = [Path(archive).stem for archive, _ in self.dataset.resources]
        if self.download and not all((self._folder / file).is_file() for file in files):
            with self._downloading():
                self.dataset(str(self.root), download=True)
        self._check()

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or test images, uint8 ``(n, 1, 28, 28)``, and labels, int64 ``(n,)``."""
        self._check()
        with self._reading():
            dataset = self.dataset(str(self.root), train=train)
            return dataset.data[:, None], dataset.targets

    @property
    def _folder(self) -> Path:
        return self.root / self.dataset.__name__ / "raw"

    def _check(self) -> None:
        self._check_files(self._folder, self.md5_by_file)
