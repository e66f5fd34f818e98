"""Splits of a data set, and batches of them."""

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_advknn.data.files import ImageFiles

_SHARE = 32  # of a GPU's memory, that the images of a split may take


class Batch(NamedTuple):
    """Images with their labels and ids."""

    images: Tensor
    """float32 ``(B, channels, H, W)`` in [0, 1]."""
    labels: Tensor
    """int64 ``(B,)``."""
    ids: Tensor
    """Position in the data set's original split, int64 ``(B,)``."""


class TrainingLoader(DataLoader[Batch]):
    """Training batches; when training resumes within an epoch, those already used are skipped.

    Lightning itself would start the epoch again.
    """

    trainer: Trainer | None = None  # no argument: Lightning copies loaders by their arguments

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader returns a class of its own
        """Yield the batches that the trainer has not used; it knows their number only now."""
        had = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        yield from islice(super().__iter__(), had, None)

    def state_dict(self) -> dict[str, Any]:
        """Empty; the method tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the trainer keeps the state."""


class ImageSplit(Dataset[Batch]):
    """Images of one split, in memory or in files, and read in batches.

    Args:
        images: uint8 ``(n, channels, H, W)``, or files of such images.
        labels: int64 ``(n,)``.
        ids: int64 ``(n,)``.
    """

    def __init__(self, images: Tensor | ImageFiles, labels: Tensor, ids: Tensor) -> None:
        self.images, self.labels, self.ids = images, labels, ids
        self._on: dict[torch.device, ImageSplit] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices).to(self.ids.device)
        # By a tensor: by a number, a GPU multiplies with a reciprocal, and rounds some pixels otherwise.
        white = torch.full((), 255.0, device=self.ids.device)
        return Batch(self.images[chosen] / white, self.labels[chosen], self.ids[chosen])

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(part[0] for part in self.__getitems__([index])))

    def on(self, device: torch.device) -> "ImageSplit":
        """The split in a GPU's memory, with images as bytes, if they are a small share of it; else itself.

        The batches are the same bit for bit, but on the GPU. They are copied there once, not in every epoch.
        """
        images = self.images
        if device.type != "cuda" or not isinstance(images, Tensor):
            return self
        if images.nbytes > torch.cuda.get_device_properties(device).total_memory // _SHARE:
            return self
        if device not in self._on:
            there = self._on[device] = copy(self)
            there.images = images.to(device)
            there.labels, there.ids = self.labels.to(device), self.ids.to(device)
        return self._on[device]

    def select(self, indices: Tensor) -> "ImageSplit":
        """The images at these positions, int64 ``(n,)``, in order of id."""
        indices = indices.sort().values
        images = self.images
        chosen = images[indices] if isinstance(images, Tensor) else images.select(indices)
        return ImageSplit(chosen, self.labels[indices], self.ids[indices])


def as_batch(batch: Any) -> Batch:
    """Collate function: `ImageSplit.__getitems__` has already made the batch."""
    return batch  # type: ignore[no-any-return]
