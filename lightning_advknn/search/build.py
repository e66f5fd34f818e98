"""Banks of a network's features of the training images."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.choices import Backend, Metric
from lightning_advknn.data import Batch
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import ASKED, FeatureNetwork, check_function, device_of
from lightning_advknn.search import (
    Exchange,
    MemoryBank,
    ShardedBank,
    StoredRows,
    check_backend,
    check_room,
    in_memory,
)


def check_batch(batch: Batch) -> None:
    """Raise a ValueError unless a batch has images in [0, 1], and a label and an id for each of them."""
    if not isinstance(batch, Batch):
        raise ValueError(
            f"Expected batches as `data.Batch` (images, labels, ids), but got a {type(batch).__name__}. Make them with"
            " `Batch(images, labels, ids)`, where an id is an image's position in its data set."
        )
    functional.check_images(batch.images)
    functional.check_labels(batch.labels, len(batch.images))
    ids = batch.ids
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != batch.labels.shape:
        got = (
            f"{ids.dtype} of shape {tuple(ids.shape)}"
            if isinstance(ids, Tensor)
            else f"a {type(ids).__name__}"
        )
        raise ValueError(
            f"Expected int64 `ids` of shape ({len(batch.images)},), one an image, but got {got}. Number the images of a data set."
        )


@torch.no_grad()
@float32_arithmetic()
def build_banks(
    network: FeatureNetwork,
    loader: Iterable[Batch],
    num_classes: int | None,
    metric: Metric = "cosine",
    backend: Backend = "auto",
    memory_gib: float | None = None,
    folder: Path | None = None,
    index: Mapping[str, int] | None = None,
    over_ranks: Literal["copy"] | Exchange | None = None,
) -> dict[str, MemoryBank]:
    """Store each layer's features of all images of a loader.

    Over ranks, those of the default process group, each computes the features of its share of the batches, and all call this
    with the same images in the same batches.

    Args:
        network: A function of the image; a few images of the first batch say whether it is
            (`check_function`).
        loader: The training images.
        num_classes: C; None for one more than the largest label.
        metric: Distance of the banks.
        backend: What scans them.
        memory_gib: Memory for banks and searches, of the network's device, in GiB; None for as much as it takes.
            Banks beyond it are kept on disk and read in blocks.
        folder: Where on disk; None for the system's temporary folder.
        index: Settings of an approximate backend, as of `MemoryBank`.
        over_ranks: ``copy``: the ranks send each other what they compute, and each has all. An exchange: each keeps what it
            computes, and they search by this. None: this process does it alone.

    Returns:
        A bank for each of the network's layers, on the network's device.

    Raises:
        ValueError: If an image is out of range, a label is no class, a feature is not finite, an image's
            features depend on more than the image, there are no images, `memory_gib` is too little, the
            backend cannot search such features, or a rank would have no row.
        OSError: If the disk is full, or will be.
    """
    check_backend(backend)
    device = device_of(network)
    if not hasattr(loader, "dataset"):  # no DataLoader
        loader = list(loader)
    sizes = _batch_sizes(loader)
    mine = range(len(sizes))
    if isinstance(over_ranks, Exchange):
        mine = mine[dist.get_rank() :: dist.get_world_size()]
        if len(sizes) < dist.get_world_size():
            raise ValueError(
                f"Expected at least as many batches of training images as ranks, {dist.get_world_size()}, to spread the bank,"
                f" but got {len(sizes)}. Lower the data's `eval_batch_size`, or use fewer ranks."
            )
    if not sum(sizes):
        raise ValueError("Expected training images for the bank, but got none.")
    total = sum(sizes[number] for number in mine)
    kept: dict[str, Tensor] = {}
    stored: dict[str, StoredRows] = {}
    # In one piece: what is kept of every batch would hold on to the memory that batches leave behind.
    labels, ids = torch.empty(2, sum(sizes), dtype=torch.int64, device=device)
    start = end = 0
    features_of = _features_in_turn if over_ranks == "copy" else _features
    for batch, features in features_of(network, tqdm(loader, desc="bank", disable=None, leave=False), mine):
        if features and not start:
            check_function(network, batch.images[:ASKED].to(device))
            widths = {layer: rows.shape[1] for layer, rows in features.items()}
            fits = set(widths) if memory_gib is None else in_memory(total, widths, memory_gib, backend, index)
            for layer, width in widths.items():
                check_backend(backend, width, layer in fits)
                if layer in fits:
                    kept[layer] = torch.empty(total, width, device=device)
                else:
                    stored[layer] = StoredRows(width, torch.float32, folder, device)
            copies = dist.get_world_size() if over_ranks == "copy" else 1
            check_room(folder, total, {layer: widths[layer] for layer in stored}, backend, copies)
        for layer, rows in features.items():
            if layer in kept:
                kept[layer][start : start + len(rows)] = rows
            else:
                stored[layer].append(rows)
        image_shape = tuple(batch.images.shape[1:])
        seen = slice(end, end + len(batch.ids))
        labels[seen], ids[seen] = batch.labels, batch.ids
        end = seen.stop
        start += len(batch.ids) if features else 0
    places = torch.split(torch.arange(len(ids), device=device), sizes)
    rows = torch.cat([places[number] for number in mine])
    banks: dict[str, Tensor | StoredRows] = {**kept, **stored}
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    made: dict[str, MemoryBank] = {
        layer: MemoryBank(banks[layer], labels[rows], ids[rows], num_classes, metric, backend, index)
        for layer in network.layers
    }
    if isinstance(over_ranks, Exchange):
        made = {layer: ShardedBank(own, rows, labels, ids, over_ranks) for layer, own in made.items()}
    for bank in made.values():
        bank.image_shape = image_shape
    return made


def _batch_sizes(loader: Iterable[Batch]) -> list[int]:
    dataset: Any = getattr(loader, "dataset", None)  # of a DataLoader
    if dataset is None:
        for batch in loader:
            check_batch(batch)
        return [len(batch.ids) for batch in loader]
    size = cast(DataLoader[Batch], loader).batch_size or len(dataset)
    return [min(size, len(dataset) - start) for start in range(0, len(dataset), size)]


def _features(
    network: FeatureNetwork, loader: Iterable[Batch], mine: Collection[int]
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """All batches, some with their features ``(n, D)`` by layer, the others with none."""
    device = device_of(network)
    for number, batch in enumerate(loader):
        check_batch(batch)
        yield batch, network.features(batch.images.to(device)) if number in mine else {}


def _features_in_turn(
    network: FeatureNetwork, loader: Iterable[Batch], mine: Collection[int]
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """All batches with their features, each computed by one rank and sent to the others."""
    device = device_of(network)
    batches = iter(loader)
    while turn := list(islice(batches, dist.get_world_size())):
        # A rank for which there is none left learns the features' widths.
        own = turn[dist.get_rank() % len(turn)]
        check_batch(own)
        computed = network.features(own.images.to(device))
        for source, batch in enumerate(turn):
            here = source == dist.get_rank()
            features = {
                layer: rows.contiguous() if here else rows.new_empty(len(batch.ids), rows.shape[1])
                for layer, rows in computed.items()
            }
            for rows in features.values():
                dist.broadcast(rows, source)
            yield batch, features
