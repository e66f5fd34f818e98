"""The victims: kNN on one layer, DkNN on several."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.data import Batch
from lightning_advknn.functional import Convention, float32_arithmetic
from lightning_advknn.models import ASKED, FeatureNetwork, Frozen, check_function, device_of
from lightning_advknn.search import (
    Backend,
    Exchange,
    MemoryBank,
    Metric,
    ShardedBank,
    StoredRows,
    check_backend,
    check_room,
    in_memory,
)


class KNNClassifier(Frozen):
    """Majority vote of the k nearest training images in one layer's features (Eq. 9-11), always in evaluation mode.

    Args:
        network: Gives the layer's features.
        layer: One of the network's layers.
        bank: That layer's features of the training images.
        k: Neighbours that vote; 75 in the paper.

    Raises:
        ValueError: If the network does not give the layer or k exceeds the bank.
    """

    def __init__(self, network: FeatureNetwork, layer: str, bank: MemoryBank, k: int = 75) -> None:
        super().__init__()
        if layer not in network.layers:
            raise ValueError(f"Expected `layer` to be one of {list(network.layers)}, but got {layer!r}.")
        bank.check_k(k)
        self.network, self.layer, self.bank, self.k = network, layer, bank, functional.whole("k", k)
        self.eval()

    def votes(self, features: Mapping[str, Tensor]) -> Tensor:
        """Votes int64 ``(B, C)`` for features ``(B, D)`` by layer."""
        return self.bank.votes(features[self.layer], self.k)

    @float32_arithmetic()
    def forward(self, images: Tensor) -> Tensor:
        """Predicted classes int64 ``(B,)`` of images in [0, 1].

        Raises:
            ValueError: If an image is out of range or unlike the bank's, or a feature is not finite.
        """
        check_images_of(self.bank, images)
        return functional.knn_prediction(self.votes(self.network.features(images)))


class DkNNClassifier(Frozen):
    """Deep kNN (arXiv 1803.04765): the kNN votes of several layers summed (Eq. 4), with credibility (Eq. 5).

    It is always in evaluation mode.

    Args:
        network: Gives the layers' features.
        banks: For each of the network's layers, the training images' features.
        k: Neighbours that vote in each layer; 75 in the paper.
        convention: How credibility counts ties.

    Raises:
        ValueError: If a layer has no bank, k exceeds one or is no whole number, or the convention is unknown.
    """

    calibration_votes: Tensor

    def __init__(
        self,
        network: FeatureNetwork,
        banks: Mapping[str, MemoryBank],
        k: int = 75,
        convention: Convention = "strict",
    ) -> None:
        super().__init__()
        if convention not in get_args(Convention):
            raise ValueError(
                f"Expected `convention` to be one of {get_args(Convention)}, but got {convention!r}."
            )
        missing = [layer for layer in network.layers if layer not in banks]
        if missing:
            raise ValueError(f"Expected a bank for each layer, but {missing} have none.")
        self.network, self.k, self.convention = network, functional.whole("k", k), convention
        self.queries = 0
        """Images that it has been asked about so far: what an attack costs its victim."""
        self.knns = nn.ModuleList(KNNClassifier(network, layer, banks[layer], k) for layer in network.layers)
        device = banks[network.layers[0]].labels.device
        empty = torch.empty(0, len(network.layers), dtype=torch.int64, device=device)
        self.register_buffer("calibration_votes", empty, persistent=False)
        self.eval()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the voting layers, in the order of votes' second dimension."""
        return self.network.layers

    @property
    def banks(self) -> dict[str, MemoryBank]:
        """Each layer's bank by name; row m is the same training image in all of them."""
        knns = cast(Iterable[KNNClassifier], self.knns)
        return {knn.layer: knn.bank for knn in knns}

    @property
    def num_classes(self) -> int:
        """C."""
        return next(iter(self.banks.values())).num_classes

    def only(self, layer: str) -> "DkNNClassifier":
        """The kNN on one of the layers, as a DkNN of that layer alone; shares its bank.

        Raises:
            ValueError: If DkNN does not have the layer.
        """
        if layer not in self.layers:
            raise ValueError(f"Expected `layer` to be one of {list(self.layers)}, but got {layer!r}.")
        network = FeatureNetwork(self.network.network, [layer])
        one = DkNNClassifier(network, self.banks, self.k, self.convention)
        position = self.layers.index(layer)
        one.calibration_votes = self.calibration_votes[:, position : position + 1]
        return one

    def votes(self, features: Mapping[str, Tensor]) -> Tensor:
        """Votes int64 ``(B, L, C)`` for features ``(B, D)`` by layer."""
        knns = cast(Iterable[KNNClassifier], self.knns)
        votes = torch.stack([knn.votes(features) for knn in knns], dim=1)
        self.queries += len(votes)
        return votes

    def search(self, features: Mapping[str, Tensor], k: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's k nearest rows, as `MemoryBank.search`: distances ``(B, k)`` and bank rows ``(B, k)``."""
        self.queries += len(next(iter(features.values())))
        return {layer: self.banks[layer].search(features[layer], k) for layer in self.layers}

    @torch.no_grad()
    @float32_arithmetic()
    def forward(self, images: Tensor) -> Tensor:
        """Predicted classes int64 ``(B,)`` of images in [0, 1] (Eq. 4).

        Raises:
            ValueError: If an image is out of range or unlike the bank's, or a feature is not finite.
        """
        self.check_images(images)
        return functional.dknn_prediction(self.votes(self.network.features(images)))

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError unless images are in [0, 1] and of the shape of those in the banks."""
        check_images_of(self.banks[self.layers[0]], images)

    @torch.no_grad()
    @float32_arithmetic()
    def calibrate(self, loader: Iterable[Batch]) -> None:
        """Keep the true-class votes ``(N, L)`` of the calibration images, for Eq. (5).

        Raises:
            ValueError: If an image is out of range or unlike the bank's, a label is no class, a feature is
                not finite, or there are no images.
        """
        device = self.calibration_votes.device
        parts = []
        for batch in tqdm(loader, desc="calibration", disable=None, leave=False):
            check_batch(batch)
            self.check_images(batch.images)
            votes = self.votes(self.network.features(batch.images.to(device)))
            parts.append(functional.true_class_votes(votes, batch.labels.to(device)))
        if not sum(map(len, parts)):
            raise ValueError(
                "Expected calibration images, but got none. Give those of the split `calibration`."
            )
        self.calibration_votes = torch.cat(parts)

    def credibility(self, votes: Tensor) -> Tensor:
        """Credibility (Eq. 5) float64 ``(B,)`` of votes ``(B, L, C)``.

        Raises:
            ValueError: If `calibrate` has not run.
        """
        return functional.credibility(votes, self.calibration_votes.sum(1), self.convention)


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


def check_images_of(bank: MemoryBank, images: Tensor) -> None:
    """Raise a ValueError unless images are in [0, 1], where a bank is, and of the shape of those in it, where that is known."""
    functional.check_images(images)
    if images.device != bank.labels.device:
        raise ValueError(
            f"Expected images on {bank.labels.device}, as the bank, but they are on {images.device}. Move them with `.to`."
        )
    shape = bank.image_shape
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(
            f"Expected images of shape (B, {', '.join(map(str, shape))}), as in the bank, but got {tuple(images.shape)}. Channels"
            " come before height and width."
        )


@torch.no_grad()
@float32_arithmetic()
def build_banks(
    network: FeatureNetwork,
    loader: Iterable[Batch],
    num_classes: int,
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
        num_classes: C.
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
