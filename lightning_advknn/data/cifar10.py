"""CIFAR-10."""

import pickletools
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from lightning_advknn.data.base import ImageDataModule

_PLAIN = {  # what a pickle of arrays may name; any other name could run code
    f"{module} {name}"
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for name in ("_reconstruct", "ndarray", "dtype")
} | {"_codecs encode"}


class _OwnCIFAR10(torchvision.datasets.CIFAR10):  # type: ignore[misc]  # torchvision ships no types
    """The reader of torchvision without class names and checksums, which `ImageDataModule` verifies."""

    def _check_integrity(self) -> bool:
        return True

    def _load_meta(self) -> None:
        pass


class CIFAR10(ImageDataModule):
    """Colour photographs of ten classes: 50,000 training and 10,000 test images of 3x32x32, from torchvision.

    Files: ``root/cifar-10-batches-py/{data_batch_1..5,test_batch}``. They are pickles; those that would run
    code are refused. Arguments and splits as in `ImageDataModule`.
    """

    image_shape = (3, 32, 32)
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )

    @property
    def _folder(self) -> Path:
        return self.root / str(torchvision.datasets.CIFAR10.base_folder)

    def prepare_data(self) -> None:
        """Download missing files, if `download` is set, and check all files."""
        files = self._md5_by_file(True) | self._md5_by_file(False)
        if self.download and not all((self._folder / file).is_file() for file in files):
            with self._downloading():
                torchvision.datasets.CIFAR10(str(self.root), download=True)
        self._check_files(self._folder, files)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or test images, uint8 ``(n, 3, 32, 32)``, and labels, int64 ``(n,)``."""
        files = self._md5_by_file(train)
        self._check_files(self._folder, files)
        with self._reading():
            for file in files:
                _check_plain(self._folder / file)
            dataset = _OwnCIFAR10(str(self.root), train=train)
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            return images, torch.tensor(dataset.targets, dtype=torch.int64)

    @staticmethod
    def _md5_by_file(train: bool) -> dict[str, str]:
        kind = torchvision.datasets.CIFAR10
        return dict(kind.train_list if train else kind.test_list)


def _check_plain(path: Path) -> None:
    """Raise a ValueError if reading a pickle could run code."""
    for operation, argument, _ in pickletools.genops(path.read_bytes()):
        names = operation.name in ("GLOBAL", "INST")
        if (names and argument not in _PLAIN) or operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(
                f"{path} would run {argument or 'code'}; a pickle of arrays in protocol 2, such as the"
                " official ones, would not"
            )
