"""Images that are read from their files when needed."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_advknn.data.decoding import decode

T = TypeVar("T")
R = TypeVar("R")

_NAMED = 5  # files that an error names


class ImageFile(NamedTuple):
    """A file of one image."""

    name: str
    """Its path relative to the root, with ``/``."""
    digest: str
    """SHA-256 of the file."""
    shape: tuple[int, int, int]
    """Channels, height and width of the decoded image."""
    pixels: str
    """SHA-256 of the decoded pixels."""


class ImageFiles:
    """RGB images of one shape, which indexing reads from their files, as uint8 ``(..., 3, H, W)``.

    Args:
        root: Folder that the names are relative to.
        files: The files.
        image_size: As in `examine`.
        background: As in `examine`.
    """

    dtype = torch.uint8

    def __init__(
        self,
        root: Path,
        files: Sequence[ImageFile],
        image_size: int | None,
        background: Sequence[float] | None,
    ) -> None:
        self.root, self.files, self.image_size, self.background = root, files, image_size, background

    @classmethod
    def examine(
        cls,
        root: Path,
        names: Sequence[str],
        image_size: int | None = None,
        background: Sequence[float] | None = None,
    ) -> "ImageFiles":
        """Read every file once, to find damaged ones and to hash all contents.

        Args:
            root: Folder that the names are relative to.
            names: Paths of the files, at least one.
            image_size: Height and width of the images: the shorter side is resized to it (bilinear,
                antialiased), then the centre is cropped. None keeps them as they are.
            background: Red, green and blue in [0, 1] behind transparent pixels; None refuses those.

        Raises:
            ValueError: If a file is damaged or cannot be decoded exactly, or if shapes differ without
                `image_size`.
        """

        def look(name: str) -> ImageFile | str:
            try:
                content = (root / name).read_bytes()
                pixels = decode(content, image_size, background)
            except Exception as error:  # decoders raise anything for a damaged file
                return f"{root / name} ({error or type(error).__name__})"
            channels, height, width = pixels.shape
            read = hashlib.sha256(repr(pixels.shape).encode() + pixels.numpy().tobytes()).hexdigest()
            return ImageFile(name, _digest(content), (channels, height, width), read)

        looks = _in_threads(look, names)
        damaged = [each for each in looks if isinstance(each, str)]
        if damaged:
            more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
            raise ValueError(
                "Expected readable images of one frame and 8 bits a channel, but got"
                f" {'; '.join(damaged[:_NAMED])}{more}. Follow the advice for each file; replace or delete"
                " files that are truncated, corrupt or in another format."
            )
        files = [each for each in looks if not isinstance(each, str)]
        for file in files:
            if file.shape != files[0].shape:
                raise ValueError(
                    f"Expected images of one size, but {root / files[0].name} is of shape {files[0].shape}"
                    f" and {root / file.name} of {file.shape}. Set `image_size` to resize and crop all."
                )
        return cls(root, files, image_size, background)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """n, channels, height, width."""
        return (len(self.files), *self.files[0].shape)

    @property
    def names(self) -> list[str]:
        """Path of each image, relative to the root."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """Read one image, or the images at these positions, int64 ``(n,)``."""
        if isinstance(index, int) or not index.ndim:
            return self._read(int(index))
        if not len(index):
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return torch.stack(_in_threads(self._read, index.tolist()))

    def select(self, indices: Tensor) -> "ImageFiles":
        """The files at these positions, int64 ``(n,)``, without reading them."""
        files = [self.files[index] for index in indices.tolist()]
        return ImageFiles(self.root, files, self.image_size, self.background)

    def digest(self) -> bytes:
        """Hash of names, contents, pixels and order."""
        return hashlib.sha256(repr([tuple(file) for file in self.files]).encode()).digest()

    def _read(self, index: int) -> Tensor:
        file = self.files[index]
        path = self.root / file.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise OSError(
                f"Expected {path} to be as it was at the start, but reading it failed: {error}. Restore it,"
                " and start again."
            ) from error
        if _digest(content) != file.digest:
            raise OSError(
                f"Expected {path} to be as it was at the start, but it has changed since. Do not change"
                " images while they are used, and start again."
            )
        return decode(content, self.image_size, self.background)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply a function to each item in threads, which decoders let run in parallel; results are in order."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))
