"""The test images of an experiment, in shards: what is attacked or queried between two saves."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_advknn.data import ImageDataModule
from lightning_advknn.data.sample import fair_order
from lightning_advknn.data.splits import ImageSplit
from lightning_advknn.storage import digest

# Images by device: of a shard, and between two saves of what takes long for each image, such as attacks on
# victims. On a GPU a save takes about as long either way, and few images leave it idle.
_SHARD = {"cpu": 1000, "cuda": 4000}
_PIECE = {"cpu": 100, "cuda": 1000}


class Shards:
    """Test images by position.

    Args:
        data: Whose.
        n: How many: a sample with classes as in the whole; None for all.
        device: Where to.
    """

    def __init__(self, data: ImageDataModule, n: int | None, device: torch.device) -> None:
        self.data, self.n, self.device = data, n, device

    @cached_property
    def split(self) -> ImageSplit:
        """The images."""
        split = self.data.split("test")
        if self.n is None or self.n == len(split):
            return split
        return split.select(fair_order(split.labels, self.data.split_seed)[: self.n])

    def __len__(self) -> int:
        return len(self.split)

    @property
    def whole(self) -> bool:
        """Whether they are all test images."""
        return len(self) == len(self.data.split("test"))

    @property
    def size(self) -> int:
        """Images of a shard."""
        return _SHARD[self.device.type]

    @property
    def piece_size(self) -> int:
        """Images of a piece."""
        return _PIECE[self.device.type]

    @property
    def pieces(self) -> list[range]:
        """Positions of all images, piece by piece."""
        return self.pieces_of(range(len(self)))

    def pieces_of(self, rows: range) -> list[range]:
        """Some positions, piece by piece."""
        size = self.piece_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    @property
    def starts(self) -> range:
        """Positions of the shards' first images."""
        return range(0, len(self), self.size)

    def positions(self, start: int) -> range:
        """Positions of a shard's images."""
        return range(start, min(start + self.size, len(self)))

    def images(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images at some positions with labels and ids, on the device."""
        images, labels, ids = self.split.on(self.device).__getitems__(rows)
        return images.to(self.device), labels.to(self.device), ids.to(self.device)

    def file(self, rows: range, piece: bool = False) -> str:
        """Name of a file on a shard or a piece, which says its size; a sample has files of its own."""
        size = self.piece_size if piece else self.size
        return f"{self._sample}{rows.start:06d}-{rows.start + size:06d}"

    @property
    def whole_file(self) -> str:
        """Name of a file on all images."""
        return f"{self._sample}000000-{len(self):06d}"

    @cached_property
    def _sample(self) -> str:
        return "" if self.whole else f"sample-{digest(self.split.ids.tolist())}-"
