"""Features of all training images by layer, computed batch by batch, and kept in memory or in files."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_advknn.data import Batch
from lightning_advknn.models import ASKED, FeatureNetwork, check_function, device_of
from lightning_advknn.search.stored_rows import Matrix

Computed = Iterator[tuple[Batch, dict[str, Tensor]]]
"""All batches with their features ``(n, D)`` by layer; without any, if another rank keeps them."""


class Extracted(NamedTuple):
    """Features of n of N images, and what all N are."""

    features: Mapping[str, Matrix]
    """float32 ``(n, D)`` by layer."""
    rows: Tensor
    """Positions of the n images among all, int64 ``(n,)``."""
    labels: Tensor
    """Of all images, int64 ``(N,)``."""
    ids: Tensor
    """Of all images, int64 ``(N,)``."""
    image_shape: tuple[int, ...]


def features_of(network: FeatureNetwork, batches: Iterable[Batch], mine: Collection[int]) -> Computed:
    """Compute the features of some batches, given by their numbers."""
    device = device_of(network)
    for number, batch in enumerate(batches):
        yield batch, network.features(batch.images.to(device)) if number in mine else {}


def features_in_turn(network: FeatureNetwork, batches: Iterable[Batch]) -> Computed:
    """Compute the features of all batches; each rank computes a share and sends it to the others."""
    device = device_of(network)
    remaining = iter(batches)
    while turn := list(islice(remaining, dist.get_world_size())):
        # A rank for which no batch is left computes another's, to learn the features' widths.
        own = turn[dist.get_rank() % len(turn)]
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


def extract(
    network: FeatureNetwork,
    computed: Computed,
    sizes: list[int],
    mine: Collection[int],
    make_room: Callable[[int, dict[str, int]], dict[str, Matrix]],
) -> Extracted:
    """Keep computed features.

    Args:
        network: Theirs. Some images of the first batch are used to check that it is a function of the image.
        computed: Batches, those in `mine` with their features.
        sizes: Number of images in each batch.
        mine: Numbers of the batches whose features this rank keeps.
        make_room: Makes room for so many rows of each layer's width.
    """
    device, total = device_of(network), sum(sizes)
    # In one piece, as the features: small tensors between large temporary ones would fragment memory.
    labels, ids = torch.empty(2, total, dtype=torch.int64, device=device)
    places = torch.split(torch.arange(total, device=device), sizes)
    rows = torch.cat([places[number] for number in mine])
    kept: dict[str, Matrix] = {}
    image_shape: tuple[int, ...] = ()
    filled = 0
    for place, (batch, features) in zip(places, computed, strict=True):
        if features and not kept:
            check_function(network, batch.images[:ASKED].to(device))
            kept = make_room(len(rows), {layer: part.shape[1] for layer, part in features.items()})
        for layer, part in features.items():
            _write(part, kept[layer], filled)
        filled += len(place) if features else 0
        labels[place], ids[place] = batch.labels.to(device), batch.ids.to(device)
        image_shape = tuple(batch.images.shape[1:])
    return Extracted(kept, rows, labels, ids, image_shape)


def _write(rows: Tensor, into: Matrix, start: int) -> None:
    if isinstance(into, Tensor):
        into[start : start + len(rows)] = rows
    else:
        into.append(rows)
