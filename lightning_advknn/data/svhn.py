"""SVHN."""

import torch
import torchvision
from torch import Tensor

from lightning_advknn.data.base import ImageDataModule


class _OwnSVHN(torchvision.datasets.SVHN):  # type: ignore[misc]  # torchvision ships no types
    """The reader of torchvision without checksums, which `ImageDataModule` verifies."""

    def _check_integrity(self) -> bool:
        return True


class SVHN(ImageDataModule):
    """Street-view house numbers: 73,257 training and 26,032 test images of 3x32x32, from torchvision.

    Files: ``root/{train,test}_32x32.mat``, where label 10 is the digit 0. Arguments and splits as in
    `ImageDataModule`.
    """

    image_shape = (3, 32, 32)

    def prepare_data(self) -> None:
        """Download missing files, if `download` is set, and check all files."""
        for split, (_, file, md5) in torchvision.datasets.SVHN.split_list.items():
            if split == "extra":
                continue
            if self.download and not (self.root / file).is_file():
                with self._downloading():
                    torchvision.datasets.SVHN(str(self.root), split=split, download=True)
            self._check_files(self.root, {file: md5})

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or test images, uint8 ``(n, 3, 32, 32)``, and labels, int64 ``(n,)``."""
        split = "train" if train else "test"
        _, file, md5 = torchvision.datasets.SVHN.split_list[split]
        self._check_files(self.root, {file: md5})
        with self._reading():
            dataset = _OwnSVHN(str(self.root), split=split)
            images = torch.from_numpy(dataset.data).contiguous()
            return images, torch.from_numpy(dataset.labels).reshape(-1)
