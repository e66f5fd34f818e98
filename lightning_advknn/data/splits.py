"""Splits of a data set, and batches of them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_advknn.data.files import ImageFiles


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

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return Batch(self.images[chosen] / 255, self.labels[chosen], self.ids[chosen])

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(part[0] for part in self.__getitems__([index])))

    def select(self, indices: Tensor) -> "ImageSplit":
        """The images at these positions, int64 ``(n,)``, in order of id."""
        indices = indices.sort().values
        images = self.images
        chosen = images[indices] if isinstance(images, Tensor) else images.select(indices)
        return ImageSplit(chosen, self.labels[indices], self.ids[indices])


def as_batch(batch: Any) -> Batch:
    """Collate function: `ImageSplit.__getitems__` has already made the batch."""
    return batch  # type: ignore[no-any-return]
