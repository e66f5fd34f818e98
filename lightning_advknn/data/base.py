"""Splits and loaders shared by all data sets."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.utils import check_integrity

from lightning_advknn.data.files import ImageFiles
from lightning_advknn.functional import check_defaults, check_labels, whole

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Batch(NamedTuple):
    """Images with what they are."""

    images: Tensor
    """float32 ``(B, channels, H, W)`` in [0, 1]."""
    labels: Tensor
    """int64 ``(B,)``."""
    ids: Tensor
    """Position in the data set's original split, int64 ``(B,)``."""


class TrainingLoader(DataLoader[Batch]):
    """Batches of an epoch that go on where the trainer is: after resuming in the middle of one, without those it has had.

    Lightning itself would begin the epoch's order again.
    """

    trainer: Trainer | None = None  # no argument: Lightning makes loaders again from theirs

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises its own kind of iterator
        """Nothing happens before the first batch is asked for: only then the trainer knows how far it is."""
        had = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        yield from islice(super().__iter__(), had, None)

    def state_dict(self) -> dict[str, Any]:
        """Nothing that the trainer does not know; but with it, Lightning trusts that the loader can go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class ImageSplit(Dataset[Batch]):
    """Images of one split, in memory as uint8 or in files, read a batch at a time.

    Args:
        images: uint8 ``(n, channels, H, W)``, or files of such images.
        labels: int64 ``(n,)``.
        ids: int64 ``(n,)``.
    """

    def __init__(self, images: Tensor | ImageFiles, labels: Tensor, ids: Tensor) -> None:
        self.images, self.labels, self.ids = images, labels, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return Batch(self.images[chosen] / 255, self.labels[chosen], self.ids[chosen])

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(part[0] for part in self.__getitems__([index])))

    def select(self, indices: Tensor) -> "ImageSplit":
        """The rows at these positions, int64 ``(n,)``, in order of image id."""
        indices = indices.sort().values
        images = self.images
        chosen = images[indices] if isinstance(images, Tensor) else images.select(indices)
        return ImageSplit(chosen, self.labels[indices], self.ids[indices])


class MissingDataError(FileNotFoundError):
    """A data set's files are not there and could not be downloaded; the message says where to get them."""


class ImageDataModule(LightningDataModule, ABC):
    """Splits one data set into what a kNN evaluation needs, always the same way for a `split_seed`.

    The training split gives ``train`` (which is also the bank) and ``val`` (held out of it, picks epochs); the
    test split gives ``calibration`` and ``test``. The four are disjoint.

    Args:
        root: Folder of the data files, in torchvision's layout.
        download: Fetch missing files.
        verify_checksums: Refuse files that differ from the official ones. Switch off for files of your own.
        batch_size: Images a training step.
        eval_batch_size: Images a batch elsewhere.
        val_size: Images held out of the training split.
        calibration_per_class: Images of each class taken from the test split for calibration; 75 in the paper.
        split_seed: Seed of the splits.
    """

    num_classes: int = 10
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = tuple("0123456789")
    """In order of labels."""
    note: str = ""
    """What results have to say of the files, if anything."""

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
        self.name: str = type(self).__name__  # as checkpoints and results carry it
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("val_size", val_size, 1),
            ("calibration_per_class", calibration_per_class, 1),
        ):
            if whole(name, value) < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
        self.root = Path(root)
        self.download = download
        self.verify_checksums = verify_checksums
        # Python's own integers: of these `share` and the splits' generator know.
        self.batch_size = int(batch_size)
        self.eval_batch_size = int(eval_batch_size)
        self.val_size = int(val_size)
        self.calibration_per_class = int(calibration_per_class)
        self.split_seed = whole("split_seed", split_seed)
        self._splits: dict[str, ImageSplit] = {}

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor | ImageFiles, Tensor]:
        """Read one original split: images uint8 ``(n, channels, H, W)``, or files of such, and labels int64 ``(n,)``.

        Labels of other whole numbers are taken as they are; anything else is a ValueError.
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
        """One of the splits ``train``, ``val``, ``calibration``, ``test``, in order of image id."""
        self.setup()
        return self._splits[name]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class, in order of labels, by split."""
        return {
            name: self.split(name).labels.bincount(minlength=self.num_classes).tolist()
            for name in ("train", "val", "calibration", "test")
        }

    def share(self, other: "ImageDataModule") -> None:
        """Take over another's splits, if it is made alike, instead of reading the files again."""
        if type(self) is type(other) and self._made_of() == other._made_of():
            other.setup()
            self._splits = other._splits
            self.image_shape, self.num_classes = other.image_shape, other.num_classes
            self.class_names, self.note = other.class_names, other.note
            self.fingerprint = other.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of every split's images, labels and ids."""
        total = hashlib.sha256()
        for name in ("train", "val", "calibration", "test"):
            split = self.split(name)
            for part in (split.images, split.labels, split.ids):
                total.update(part.numpy().tobytes() if isinstance(part, Tensor) else part.digest())
        return total.hexdigest()[:16]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training images; the order depends on the global seed and the epoch only, so a run resumes exactly."""
        trainer = self.trainer
        split = self.split("train")
        sampler: DistributedSampler[Batch] = DistributedSampler(
            split,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            # The sampler adds the epoch: far apart, seed 0's second epoch is not seed 1's first.
            seed=torch.initial_seed() * 1_000_003 % 2**32,
        )
        loader = TrainingLoader(split, batch_size=self.batch_size, sampler=sampler, collate_fn=_as_batch)
        loader.trainer = trainer
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Images that pick epochs, each once over all ranks."""
        return self._shard("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images without the calibration ones, each once over all ranks."""
        return self._shard("test")

    def loader(self, split: str) -> DataLoader[Batch]:
        """All images of a split in order of id, whole on every rank."""
        return DataLoader(self.split(split), batch_size=self.eval_batch_size, collate_fn=_as_batch)

    def _made_of(self) -> dict[str, Any]:
        """What decides on its splits."""
        no_matter = ("batch_size", "eval_batch_size", "download")
        found = ("fingerprint", "image_shape", "num_classes", "class_names", "note")  # in the files
        plain = (str, int, float, bool, Path, tuple)
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, plain) and name not in (*no_matter, *found)
        }

    def _shard(self, name: str) -> DataLoader[Batch]:
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return self.loader(name)
        # Lightning's default pads the last shard with repeated images, which would count them twice.
        split = self.split(name)
        sampler = UnrepeatedDistributedSampler(
            split, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
        )
        return DataLoader(split, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=_as_batch)

    def _read(self, train: bool) -> ImageSplit:
        images, labels = self.load(train)
        shape = tuple(self.image_shape)
        for what, part in (("images", images), ("labels", labels)):
            if not isinstance(part, Tensor | ImageFiles):
                raise ValueError(
                    f"Expected `load` of {self.name} to give {what} as a tensor, but got a {type(part).__name__}. Convert them"
                    " with `torch.as_tensor`."
                )
        if images.dtype != torch.uint8 or images.shape[1:] != shape or len(images) != len(labels):
            raise ValueError(
                f"Expected {self.name} images of bytes of shape {shape} and a label each, but got"
                f" {images.dtype} {tuple(images.shape)} images and {tuple(labels.shape)} labels in {self.root}."
            )
        if labels.ndim == 1 and labels.dtype in _INTEGERS:
            labels = labels.long()  # exactly, and so of one fingerprint
        else:
            check_labels(labels, len(images))
        if not len(labels) or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"Expected {self.name} labels in [0, {self.num_classes - 1}], but the files in {self.root} hold"
                f" {sorted(set(labels.tolist()))[:12]}."
            )
        return ImageSplit(images, labels, torch.arange(len(images)))

    def _held_out(self, labels: Tensor) -> Tensor:
        """Which training images are for validation, int64 ``(n,)``, of training labels int64 ``(N,)``."""
        return torch.randperm(len(labels), generator=self._generator())[: self.val_size]

    def _per_class(self, labels: Tensor) -> Tensor:
        shuffled = torch.randperm(len(labels), generator=self._generator())
        chosen = []
        for label in range(self.num_classes):
            of_class = shuffled[labels[shuffled] == label]
            if len(of_class) <= self.calibration_per_class:
                raise ValueError(
                    f"Expected `calibration_per_class` to be below {len(of_class)} (test images of class {label}),"
                    f" but got {self.calibration_per_class}."
                )
            chosen.append(of_class[: self.calibration_per_class])
        return torch.cat(chosen)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.split_seed)

    def _check_files(self, folder: Path, md5_by_file: Mapping[str, str | None]) -> None:
        """Raise unless each file is there and, if checksums are verified and its own is known, is the official one."""
        for file, md5 in md5_by_file.items():
            path = folder / file
            if not path.is_file():
                raise MissingDataError(
                    f"Expected {self.name}'s file {path}, but it is missing. Set `root` to the folder that holds"
                    " it, or `download` to true."
                )
            if self.verify_checksums and md5 and not check_integrity(path, md5):
                raise ValueError(
                    f"Expected {path} to have the official MD5 sum {md5}, but it differs: the file is truncated,"
                    " corrupt or another one. Delete it and download it again, or set `verify_checksums` to false if"
                    " it is your own."
                )

    @contextmanager
    def _downloading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # no network, no room, or no mirror that has it
            raise MissingDataError(
                f"Expected to download {self.name} to {self.root}, but: {error}. Put the files there by hand, or set"
                " `root` to a folder that has them."
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged file can raise anything from a reader's depths
            raise ValueError(
                f"Expected readable {self.name} files in {self.root}, but reading them failed: {error or type(error)}."
                " They are truncated, corrupt or in another format: delete them and download them again."
            ) from error


def data_of(trainer: Trainer) -> ImageDataModule:
    """The trainer's data module; raises a TypeError unless it is an `ImageDataModule`."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            f"Expected the trainer to run with `datamodule` set to an ImageDataModule, but got {type(data).__name__}."
        )
    return data


def _others(chosen: Tensor, n: int) -> Tensor:
    """Which of n positions are not among some, both int64."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().squeeze(1)


def _as_batch(batch: Any) -> Batch:
    return batch  # type: ignore[no-any-return]  # `ImageSplit.__getitems__` has already put it together
