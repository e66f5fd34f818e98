"""KMNIST."""

import gzip
from typing import ClassVar

import torchvision

from lightning_advknn.data.base import MissingDataError
from lightning_advknn.data.mnist import MNIST


class KMNIST(MNIST):
    """Cursive Japanese characters: 60,000 training and 10,000 test images of 1x28x28, from torchvision.

    Files: ``root/KMNIST/raw/*-ubyte``, in MNIST's format, and their archives ``*-ubyte.gz``, whose checksums
    torchvision states. Arguments and splits as in `ImageDataModule`.
    """

    dataset: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.KMNIST
    class_names = tuple(torchvision.datasets.KMNIST.classes)
    md5_by_file: ClassVar[dict[str, str]] = {}

    def _check(self) -> None:
        folder = self._folder
        archives = dict(self.dataset.resources)
        files = [archive.removesuffix(".gz") for archive in archives]
        self._check_files(folder, dict.fromkeys(files))
        if not self.verify_checksums:
            return
        missing = [archive for archive in archives if not (folder / archive).is_file()]
        if missing:
            raise MissingDataError(
                f"Expected {self.name}'s archives beside its files, to verify their checksums, but {folder}"
                f" lacks {missing}. Put them there, or set `verify_checksums` to false if you trust the"
                " files."
            )
        self._check_files(folder, archives)
        for file in files:
            with self._reading(), gzip.open(folder / f"{file}.gz") as archive:
                same = archive.read() == (folder / file).read_bytes()
            if not same:
                raise ValueError(
                    f"Expected {folder / file} to equal the content of {file}.gz, but it differs. Delete it"
                    " and extract the archive again, or set `verify_checksums` to false if it is your own."
                )
