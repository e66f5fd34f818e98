"""What all data sets share: splits, loaders, and checks of files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets.utils import check_integrity

from lightning_advknn.choices import at_least, whole
from lightning_advknn.data.files import ImageFiles
from lightning_advknn.data.splits import Batch, ImageSplit, TrainingLoader, as_batch
from lightning_advknn.functional import check_defaults, check_labels

_CPU = torch.device("cpu")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MissingDataError(FileNotFoundError):
    """Files of a data set are missing and could not be downloaded."""


class ImageDataModule(LightningDataModule, ABC):
    """A data set in four disjoint splits, which depend on `split_seed` only.

    The data set's training images are split into ``train``, which also fills the bank, and ``val``, which
    picks epochs. Its test images are split into ``calibration`` and ``test``.

    Args:
        root: Folder of the data files, in torchvision's layout.
        download: Download missing files.
        verify_checksums: Refuse files that differ from the official ones. Switch it off for your own files.
        batch_size: Batch size in training.
        eval_batch_size: Batch size everywhere else.
        val_size: Number of training images in ``val``.
        calibration_per_class: Number of test images of each class in ``calibration``; 75 in the paper.
        split_seed: Seed of the splits.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = tuple("0123456789")
    """In order of labels."""
    note: str = ""
    """A remark on the files, shown with results; "" for none."""

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        verify_checksums: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_size: int = 5000,
        calibration_per_class: int = 75,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.name: str = type(self).__name__  # in checkpoints and results
        self.root = Path(root)
        self.download = download
        self.verify_checksums = verify_checksums
        # As Python's own integers, not NumPy's: `share` compares them, and torch's generator needs them.
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.eval_batch_size = at_least("eval_batch_size", eval_batch_size, 1)
        self.val_size = at_least("val_size", val_size, 1)
        self.calibration_per_class = at_least("calibration_per_class", calibration_per_class, 1)
        self.split_seed = whole("split_seed", split_seed)
        self._splits: dict[str, ImageSplit] = {}

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor | ImageFiles, Tensor]:
        """Read the training or test images, uint8 ``(n, channels, H, W)`` or files of such, and their labels.

        Labels are int64 ``(n,)``. Other integers are converted; any other labels are a ValueError.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data set, once."""
        if self._splits:
            return
        check_defaults()
        training, testing = (self._read(train) for train in (True, False))
        if not self.val_size < len(training):
            raise ValueError(
                f"Expected `val_size` to be below {len(training)} (the training split's images),"
                f" but got {self.val_size}."
            )
        val, calibration = self._held_out(training.labels), self._per_class(testing.labels)
        self._splits = {
            "train": training.select(_others(val, len(training))),
            "val": training.select(val),
            "calibration": testing.select(calibration),
            "test": testing.select(_others(calibration, len(testing))),
        }

    def split(self, name: str) -> ImageSplit:
        """The split ``train``, ``val``, ``calibration`` or ``test``, in order of image id."""
        self.setup()
        return self._splits[name]

    def counts(self) -> dict[str, list[int]]:
        """Number of images of each class, in order of labels, by split."""
        return {
            name: self.split(name).labels.bincount(minlength=self.num_classes).tolist()
            for name in ("train", "val", "calibration", "test")
        }

    def share(self, other: "ImageDataModule") -> None:
        """Use the splits of another data module with equal arguments, instead of reading the files again."""
        if type(self) is type(other) and self._arguments() == other._arguments():
            other.setup()
            self._splits = other._splits
            self.image_shape, self.num_classes = other.image_shape, other.num_classes
            self.class_names, self.note = other.class_names, other.note
            self.fingerprint = other.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the images, labels and ids of all splits."""
        total = hashlib.sha256()
        for name in ("train", "val", "calibration", "test"):
            split = self.split(name)
            for part in (split.images, split.labels, split.ids):
                total.update(part.numpy().tobytes() if isinstance(part, Tensor) else part.digest())
        return total.hexdigest()[:16]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images in an order of global seed and epoch only, so that runs resume exactly."""
        trainer = self.trainer
        split = self.split("train").on(self._device)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            split,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            # The sampler adds the epoch, so seeds must be far apart.
            seed=torch.initial_seed() * 1_000_003 % 2**32,
        )
        loader = TrainingLoader(split, batch_size=self.batch_size, sampler=sampler, collate_fn=as_batch)
        loader.trainer = trainer
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images, each on one rank only."""
        return self._shard("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images without those for calibration, each on one rank only."""
        return self._shard("test")

    def loader(self, split: str, device: torch.device = _CPU) -> DataLoader[Batch]:
        """All images of a split in order of id, on every rank; on a GPU, if they fit there (`ImageSplit.on`)."""
        images = self.split(split).on(device)
        return DataLoader(images, batch_size=self.eval_batch_size, collate_fn=as_batch)

    @property
    def _device(self) -> torch.device:
        """What the trainer computes on."""
        return self.trainer.strategy.root_device if self.trainer else _CPU

    def _arguments(self) -> dict[str, Any]:
        """The arguments that determine the splits."""
        others = ("batch_size", "eval_batch_size", "download")
        read = ("fingerprint", "image_shape", "num_classes", "class_names", "note")  # from the files
        plain = (str, int, float, bool, Path, tuple)
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, plain) and name not in (*others, *read)
        }

    def _shard(self, name: str) -> DataLoader[Batch]:
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return self.loader(name, self._device)
        # Lightning's default sampler repeats images to fill the last rank, which would count them twice.
        split = self.split(name).on(self._device)
        sampler = UnrepeatedDistributedSampler(
            split, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
        )
        return DataLoader(split, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=as_batch)

    def _read(self, train: bool) -> ImageSplit:
        images, labels = self.load(train)
        shape = tuple(self.image_shape)
        for what, part in (("images", images), ("labels", labels)):
            if not isinstance(part, Tensor | ImageFiles):
                raise ValueError(
                    f"Expected `load` of {self.name} to give {what} as a tensor, but got a"
                    f" {type(part).__name__}. Convert them with `torch.as_tensor`."
                )
        if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) != len(labels):
            raise ValueError(
                f"Expected {self.name} images in uint8 of shape {shape} and one label for each, but got"
                f" {images.dtype} {tuple(images.shape)} images and {tuple(labels.shape)} labels in"
                f" {self.root}."
            )
        if labels.ndim == 1 and labels.dtype in _INTEGERS:
            labels = labels.long()
        else:
            check_labels(labels, len(images))
        if not len(labels) or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"Expected {self.name} labels in [0, {self.num_classes - 1}], but the files in {self.root}"
                f" hold {sorted(set(labels.tolist()))[:12]}."
            )
        return ImageSplit(images, labels, torch.arange(len(images)))

    def _held_out(self, labels: Tensor) -> Tensor:
        """Positions of the training images in ``val``, int64 ``(n,)``.

        Args:
            labels: Labels of all training images, int64 ``(N,)``.
        """
        return torch.randperm(len(labels), generator=self._generator())[: self.val_size]

    def _per_class(self, labels: Tensor) -> Tensor:
        """Positions of the test images in ``calibration``, int64 ``(n,)``."""
        shuffled = torch.randperm(len(labels), generator=self._generator())
        chosen = []
        for label in range(self.num_classes):
            of_class = shuffled[labels[shuffled] == label]
            if len(of_class) <= self.calibration_per_class:
                raise ValueError(
                    f"Expected `calibration_per_class` to be below {len(of_class)} (test images of class"
                    f" {label}), but got {self.calibration_per_class}."
                )
            chosen.append(of_class[: self.calibration_per_class])
        return torch.cat(chosen)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.split_seed)

    def _check_files(self, folder: Path, md5_by_file: Mapping[str, str | None]) -> None:
        """Raise an error if a file is missing, or if its checksum is known and differs."""
        for file, md5 in md5_by_file.items():
            path = folder / file
            if not path.is_file():
                raise MissingDataError(
                    f"Expected {self.name}'s file {path}, but it is missing. Set `root` to the folder that"
                    " holds it, or `download` to true."
                )
            if self.verify_checksums and md5 and not check_integrity(path, md5):
                raise ValueError(
                    f"Expected {path} to have the official MD5 sum {md5}, but it differs: the file is"
                    " truncated, corrupt or another one. Delete it and download it again, or set"
                    " `verify_checksums` to false if it is your own."
                )

    @contextmanager
    def _downloading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # no network, no room, or no mirror that has it
            raise MissingDataError(
                f"Expected to download {self.name} to {self.root}, but: {error}. Put the files there by hand,"
                " or set `root` to a folder that has them."
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # readers raise anything for a damaged file
            raise ValueError(
                f"Expected readable {self.name} files in {self.root}, but reading them failed:"
                f" {error or type(error)}. They are truncated, corrupt or in another format: delete them and"
                " download them again."
            ) from error


def data_of(trainer: Trainer) -> ImageDataModule:
    """The trainer's data module; a TypeError if it is not an `ImageDataModule`."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            "Expected the trainer to run with `datamodule` set to an ImageDataModule, but got"
            f" {type(data).__name__}."
        )
    return data


def _others(chosen: Tensor, n: int) -> Tensor:
    """The positions below n that are not chosen, int64."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().squeeze(1)
