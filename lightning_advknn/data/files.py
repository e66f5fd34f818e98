"""Images that stay in their files until they are asked for."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

T = TypeVar("T")
R = TypeVar("R")

_NAMED = 5  # files that an error names


class ImageFile(NamedTuple):
    """One image."""

    name: str
    """Its path below the data's root, with ``/``."""
    digest: str
    """SHA-256 of its content."""
    shape: tuple[int, int, int]
    """Channels, height and width that it is read with."""


class ImageFiles:
    """RGB images of one shape, read at each use: of a sequence, what indexing gives is uint8 ``(..., 3, H, W)``.

    Args:
        root: Folder that their names are below.
        files: What is known of each.
        image_size: As in `examine`.
    """

    dtype = torch.uint8

    def __init__(self, root: Path, files: Sequence[ImageFile], image_size: int | None) -> None:
        self.root, self.files, self.image_size = root, files, image_size

    @classmethod
    def examine(cls, root: Path, names: Sequence[str], image_size: int | None) -> "ImageFiles":
        """Read every file once: all that is wrong with one is found now, and its content is known.

        Args:
            root: Folder that the names are below.
            names: At least one.
            image_size: Height and width that images get: the shorter side is resized to it (bilinear, antialiased), then the centre
                is cut out. None leaves them as they are.

        Raises:
            ValueError: If a file is damaged or no image of 8 bits a channel, or without `image_size` shapes differ.
        """

        def look(name: str) -> ImageFile | str:
            try:
                content = (root / name).read_bytes()
                shape = tuple(_decode(content, image_size).shape)
            except Exception as error:  # a damaged file can raise anything from a decoder's depths
                return f"{root / name} ({error or type(error).__name__})"
            return ImageFile(name, hashlib.sha256(content).hexdigest(), (shape[0], shape[1], shape[2]))

        looks = _in_threads(look, names)
        damaged = [each for each in looks if isinstance(each, str)]
        if damaged:
            more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
            raise ValueError(
                f"Expected readable images of 8 bits a channel, but got {'; '.join(damaged[:_NAMED])}{more}. They are truncated,"
                " corrupt or in another format: replace or delete them."
            )
        files = [each for each in looks if not isinstance(each, str)]
        for file in files:
            if file.shape != files[0].shape:
                raise ValueError(
                    f"Expected images of one size, but {root / files[0].name} is of shape {files[0].shape} and"
                    f" {root / file.name} of {file.shape}. Set `image_size` to resize and crop all."
                )
        return cls(root, files, image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """n, channels, height, width."""
        return (len(self.files), *self.files[0].shape)

    @property
    def names(self) -> list[str]:
        """Each image's path below the root."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """Read one image, or those at some positions, int64 ``(n,)``."""
        if isinstance(index, int) or not index.ndim:
            return self._read(int(index))
        if not len(index):
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return torch.stack(_in_threads(self._read, index.tolist()))

    def select(self, indices: Tensor) -> "ImageFiles":
        """The files at some positions, int64 ``(n,)``, unread."""
        return ImageFiles(self.root, [self.files[index] for index in indices.tolist()], self.image_size)

    def digest(self) -> bytes:
        """Hash of names, contents, order and the shape that they are read with."""
        return hashlib.sha256(repr([tuple(file) for file in self.files]).encode()).digest()

    def _read(self, index: int) -> Tensor:
        path = self.root / self.files[index].name
        try:
            return _decode(path.read_bytes(), self.image_size)
        except OSError as error:
            raise OSError(
                f"Expected {path} to be as it was at the start, but reading it failed: {error}."
            ) from error


def _decode(content: bytes, image_size: int | None) -> Tensor:
    with Image.open(BytesIO(content)) as image:
        if image.mode[0] in "IF":  # turned to RGB, they would be cut off at 255
            raise ValueError(f"mode {image.mode}")
        picture = image.convert("RGB")
    if image_size is not None:
        picture = F.center_crop(F.resize(picture, image_size), image_size)
    pixels: Tensor = F.pil_to_tensor(picture)
    return pixels


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What a function makes of each item, in order; decoders let other threads run."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))
