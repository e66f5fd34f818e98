"""Images and labels in the forms that users have, as batches: tensors, arrays, lists, data sets, loaders."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_advknn.data.splits import Batch
from lightning_advknn.functional import check_labels

Images = Tensor | NDArray[Any] | Sequence[Any]
"""Images ``(n, ...)`` in [0, 1]."""

Labels = Tensor | NDArray[Any] | Sequence[int]
"""Classes ``(n,)``, integers from 0."""

Labelled = Images | Dataset[Any] | DataLoader[Any] | Iterable[Batch]
"""Images, or images with labels: a Dataset or DataLoader of (image, label), or batches."""

_BATCH = 500  # images in a batch, if the source has no batches


class Batches:
    """Batches that can be read several times.

    Args:
        read: Reads all batches.
        sizes: Number of images in each batch.
    """

    def __init__(self, read: Callable[[], Iterator[Batch]], sizes: list[int]) -> None:
        self._read, self.sizes = read, sizes

    def __iter__(self) -> Iterator[Batch]:
        return self._read()

    def __len__(self) -> int:
        return len(self.sizes)


def as_batches(images: Labelled, labels: Labels | None = None) -> Batches:
    """Make batches of images and labels. Ids are positions, unless the batches have ids.

    A Dataset is read lazily, batch by batch. So is a DataLoader, if the sizes of its batches are known in
    advance. Pixels are not checked here, but by the code that reads the batches.

    Args:
        images: Images; or a Dataset, a DataLoader or batches, which contain labels.
        labels: Labels, if `images` does not contain them.

    Raises:
        ValueError: If labels are missing, given twice or not one integer for each image, or if images are not
            tensors or arrays of one shape.
    """
    if isinstance(images, Tensor | np.ndarray) or labels is not None:
        return _of_arrays(images, labels)
    if isinstance(images, DataLoader):
        return _of_loader(images)
    if isinstance(images, Dataset):
        return _of_loader(DataLoader(images, batch_size=_BATCH, collate_fn=_collate))
    batches = list(images)
    for batch in batches:
        if not isinstance(batch, Batch):
            raise ValueError(
                "Expected images with labels, a Dataset or DataLoader of (image, label), or batches as"
                f" `data.Batch` (images, labels, ids), but got {_kind(images)} of {_kind(batch)} without"
                " labels."
            )
    return Batches(lambda: iter(batches), [len(batch.images) for batch in batches])


def as_images(images: Any) -> Tensor:
    """Convert images to one tensor ``(n, ...)``; floating-point numbers become float32.

    Raises:
        ValueError: If they are not a tensor, an array or a list of them of one shape.
    """
    found = _as_tensor(images, "images", "Convert them, for example by `torchvision.transforms.ToTensor()`.")
    return found.float() if found.is_floating_point() else found


def as_labels(labels: Any, n: int) -> Tensor:
    """Convert labels of n images to int64 ``(n,)``.

    Raises:
        ValueError: If they are not one integer of at least 0 for each image.
    """
    found = _as_tensor(labels, "labels", "Number the classes from 0.")
    if not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool:
        found = found.long()
    check_labels(found, n)
    return found


def _of_arrays(images: Any, labels: Labels | None) -> Batches:
    if labels is None:
        raise ValueError("Expected `labels` beside the images, but got none. Pass the class of each image.")
    if isinstance(images, Dataset | DataLoader):
        raise ValueError(
            f"Expected no `labels` beside {_kind(images)}, which has its own. Leave them out, or pass the"
            " images as a tensor."
        )
    found = as_images(images)
    own = as_labels(labels, len(found))
    ids = torch.arange(len(found))
    starts = range(0, len(found), _BATCH)

    def read() -> Iterator[Batch]:
        for start in starts:
            rows = slice(start, start + _BATCH)
            yield Batch(found[rows], own[rows], ids[rows])

    return Batches(read, [min(_BATCH, len(found) - start) for start in starts])


def _of_loader(loader: DataLoader[Any]) -> Batches:
    def read() -> Iterator[Batch]:
        start = 0
        for item in loader:
            batch = _as_batch(item, start)
            start += len(batch.images)
            yield batch

    size, sampler = loader.batch_size, loader.sampler
    if size is None or isinstance(loader.dataset, IterableDataset) or not isinstance(sampler, Sized):
        batches = list(read())
        return Batches(lambda: iter(batches), [len(batch.images) for batch in batches])
    sizes = [min(size, len(sampler) - start) for start in range(0, len(sampler), size)]
    if loader.drop_last and sizes and sizes[-1] < size:
        sizes.pop()
    return Batches(read, sizes)


def _as_batch(item: Any, start: int) -> Batch:
    """Convert what a loader yields to a batch, with ids from `start` on."""
    if isinstance(item, Batch):
        return item
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(
            f"Expected batches of (images, labels), but got {_kind(item)}"
            + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
            + ". Pass a DataLoader of (image, label) pairs."
        )
    images = as_images(item[0])
    return Batch(images, as_labels(item[1], len(images)), torch.arange(start, start + len(images)))


def _collate(samples: Any) -> Any:
    """Join samples of a Dataset; `data.ImageSplit` returns a batch already."""
    if isinstance(samples, Batch):
        return samples
    if all(isinstance(sample, Batch) for sample in samples):
        return Batch(*map(torch.stack, zip(*samples, strict=True)))
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise ValueError(
                f"Expected a Dataset of (image, label), but one of its items is {_kind(sample)}. Wrap it in a"
                " Dataset of pairs."
            )
    images, labels = zip(*samples, strict=True)
    return as_images(images), as_labels(labels, len(samples))


def _as_tensor(values: Any, what: str, remedy: str) -> Tensor:
    wanted = f"Expected {what} as a tensor, a NumPy array or a list of them"
    if isinstance(values, Tensor):
        return values
    if isinstance(values, list | tuple) and values and all(isinstance(each, Tensor) for each in values):
        shapes = {tuple(each.shape) for each in values}
        if len(shapes) > 1:
            raise ValueError(f"{wanted}, all of one shape, but got shapes {sorted(shapes)[:3]}. Resize them.")
        return torch.stack(list(values))
    numbers = (int, float, np.ndarray, np.generic, list, tuple)
    first = values[0] if isinstance(values, list | tuple) and values else 0
    if not isinstance(values, list | tuple | np.ndarray) or not isinstance(first, numbers):
        got = _kind(values) if isinstance(first, numbers) else f"{_kind(values)} of {_kind(first)}"
        raise ValueError(f"{wanted}, but got {got}. {remedy}")
    try:
        array = np.asarray(values)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:  # text, objects, lists of several lengths
        raise ValueError(
            f"{wanted}, all numbers and of one shape, but got {str(error).rstrip('.')}. {remedy}"
        ) from error


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("a builtins.", "a ")
