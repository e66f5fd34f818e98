"""Banks of a network's features of the training images."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_advknn.choices import Backend, Metric
from lightning_advknn.data import Batch
from lightning_advknn.functional import check_images, check_labels, float32_arithmetic
from lightning_advknn.models import FeatureNetwork, device_of
from lightning_advknn.search.backends import check_backend
from lightning_advknn.search.bank import MemoryBank
from lightning_advknn.search.extraction import Extracted, extract, features_in_turn, features_of
from lightning_advknn.search.memory_plan import check_room, in_memory
from lightning_advknn.search.sharded import Exchange, ShardedBank
from lightning_advknn.search.stored_rows import Matrix, StoredRows


@dataclass(frozen=True)
class BankSettings:
    """How banks are searched and stored.

    Args:
        metric: Distance of features.
        backend: What scans the banks.
        index: Settings of an approximate backend that differ from its defaults (`search.index_settings`).
        memory_gib: Memory for banks and searches on the network's device, in GiB; None for no limit, and on
            a GPU for most of what is free. Banks beyond it are kept on disk and read in blocks.
        folder: Where on disk; None for the system's temporary folder.
    """

    metric: Metric = "cosine"
    backend: Backend = "auto"
    index: Mapping[str, int] | None = None
    memory_gib: float | None = None
    folder: Path | None = None


@torch.no_grad()
@float32_arithmetic()
def build_banks(
    network: FeatureNetwork,
    batches: Iterable[Batch],
    num_classes: int | None = None,
    settings: BankSettings | None = None,
    over_ranks: bool = False,
) -> dict[str, MemoryBank]:
    """Store each layer's features of all images.

    Args:
        network: A function of the image. Some images of the first batch are used to check that
            (`check_function`).
        batches: The training images. A DataLoader, or batches with an attribute ``sizes`` (a list of how many
            images each has), are read once, batch by batch. Anything else is first read into a list.
        num_classes: C; None for one more than the largest label.
        settings: How banks are searched and stored; None for the defaults.
        over_ranks: Whether each rank of the default process group computes the features of a share of the
            batches and sends them to the others. Then all ranks must call this with the same batches.

    Returns:
        A bank for each of the network's layers, on the network's device.

    Raises:
        ImportError: If faiss is needed but missing, unusable or installed twice.
        ValueError: If an image is out of range, a label is no class, a feature is not finite, an image's
            features depend on more than the image, a batch is not of the announced size, there are no images,
            `memory_gib` is too little, or the backend cannot search such features.
        OSError: If the disk is full, or will be.
    """
    settings = settings or BankSettings()
    check_backend(settings.backend)
    batches, sizes = _with_sizes(batches)
    batches = _checked(batches, sizes)
    mine = range(len(sizes))
    computed = features_in_turn(network, batches) if over_ranks else features_of(network, batches, mine)
    copies = dist.get_world_size() if over_ranks else 1
    make_room = partial(_make_room, settings, device_of(network), copies)
    return _banks(extract(network, computed, sizes, mine, make_room), num_classes, settings)


@torch.no_grad()
@float32_arithmetic()
def build_sharded_banks(
    network: FeatureNetwork,
    batches: Iterable[Batch],
    num_classes: int | None,
    settings: BankSettings,
    exchange: Exchange,
) -> dict[str, ShardedBank]:
    """Store the features of a share of the images on each rank. The ranks search by the exchange.

    All ranks of the default process group must call this with the same batches. Arguments and errors are
    otherwise those of `build_banks`.

    Raises:
        ValueError: Also if there are fewer batches than ranks.
    """
    check_backend(settings.backend)
    batches, sizes = _with_sizes(batches)
    ranks = dist.get_world_size()
    if len(sizes) < ranks:
        raise ValueError(
            f"Expected at least as many batches of training images as ranks, {ranks}, to spread the bank, but"
            f" got {len(sizes)}. Lower the data's `eval_batch_size`, or use fewer ranks."
        )
    mine = range(dist.get_rank(), len(sizes), ranks)
    computed = features_of(network, _checked(batches, sizes), mine)
    make_room = partial(_make_room, settings, device_of(network), 1)
    extracted = extract(network, computed, sizes, mine, make_room)
    return {
        layer: ShardedBank(own, extracted.rows, extracted.labels, extracted.ids, exchange)
        for layer, own in _banks(extracted, num_classes, settings).items()
    }


def check_batch(batch: Batch) -> None:
    """Raise a ValueError unless a batch has images in [0, 1], and a label and an id for each of them."""
    if not isinstance(batch, Batch):
        raise ValueError(
            f"Expected batches as `data.Batch` (images, labels, ids), but got a {type(batch).__name__}. Make"
            " them with `Batch(images, labels, ids)`, where an id is an image's position in its data set."
        )
    check_images(batch.images)
    check_labels(batch.labels, len(batch.images))
    ids = batch.ids
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != batch.labels.shape:
        got = (
            f"{ids.dtype} of shape {tuple(ids.shape)}"
            if isinstance(ids, Tensor)
            else f"a {type(ids).__name__}"
        )
        raise ValueError(
            f"Expected int64 `ids` of shape ({len(batch.images)},), one an image, but got {got}. Number the"
            " images of a data set."
        )


def _with_sizes(batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[int]]:
    """Batches, and the number of images in each, which must be known before the first is read."""
    sizes: list[int] | None = getattr(batches, "sizes", None)
    dataset: Any = getattr(batches, "dataset", None)  # of a DataLoader
    if sizes is None and dataset is not None:
        size = cast(DataLoader[Batch], batches).batch_size or len(dataset)
        sizes = [min(size, len(dataset) - start) for start in range(0, len(dataset), size)]
    if sizes is None:
        batches = list(batches)
        for batch in batches:
            check_batch(batch)
        sizes = [len(batch.ids) for batch in batches]
    if not sum(sizes):
        raise ValueError("Expected training images for the bank, but got none.")
    return batches, sizes


def _checked(batches: Iterable[Batch], sizes: list[int]) -> Iterator[Batch]:
    """The batches with a progress bar; a ValueError if one is invalid or not of its size."""
    bar = tqdm(batches, total=len(sizes), desc="bank", disable=None, leave=False)
    for number, (batch, size) in enumerate(zip_longest(bar, sizes)):
        if batch is not None:
            check_batch(batch)
        if batch is None or len(batch.ids) != size:
            raise ValueError(
                f"Expected {size or 'no'} images in batch {number} of the training images, but got"
                f" {len(batch.ids) if batch else 'none'}. Give every image once, in batches of the announced"
                " sizes."
            )
        yield batch


def _make_room(
    settings: BankSettings, device: torch.device, copies: int, rows: int, widths: dict[str, int]
) -> dict[str, Matrix]:
    """An unfilled matrix for each layer: in memory, or in a file if it exceeds the limit of memory.

    Args:
        settings: Which limit, and where files are.
        device: Of tensors.
        copies: Number of processes that each write the files.
        rows: Of each matrix.
        widths: D by layer.
    """
    kept = in_memory(rows, widths, settings.memory_gib, settings.backend, settings.index, device)
    for layer, width in widths.items():
        check_backend(settings.backend, width, layer in kept)
    on_disk = {layer: width for layer, width in widths.items() if layer not in kept}
    check_room(settings.folder, rows, on_disk, settings.backend, copies)
    return {
        layer: torch.empty(rows, width, device=device)
        if layer in kept
        else StoredRows(width, torch.float32, settings.folder, device)
        for layer, width in widths.items()
    }


def _banks(extracted: Extracted, num_classes: int | None, settings: BankSettings) -> dict[str, MemoryBank]:
    """A bank of the extracted rows of each layer."""
    _, rows, labels, ids, image_shape = extracted
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    how = settings.metric, settings.backend, settings.index, image_shape
    return {
        layer: MemoryBank(features, labels[rows], ids[rows], classes, *how)
        for layer, features in extracted.features.items()
    }
