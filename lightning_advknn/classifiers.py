"""The victims: kNN on one layer, DkNN on several."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.data import Batch
from lightning_advknn.functional import Convention
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import (
    Backend,
    MemoryBank,
    Metric,
    StoredRows,
    check_backend,
    check_room,
    in_memory,
)


class KNNClassifier(nn.Module):
    """Majority vote of the k nearest training images in one layer's features (Eq. 9-11).

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
        self.network, self.layer, self.bank, self.k = network, layer, bank, k

    def votes(self, features: Mapping[str, Tensor]) -> Tensor:
        """Votes int64 ``(B, C)`` for features ``(B, D)`` by layer."""
        return self.bank.votes(features[self.layer], self.k)

    def forward(self, images: Tensor) -> Tensor:
        """Predicted classes int64 ``(B,)`` of images in [0, 1].

        Raises:
            ValueError: If an image is out of range or a feature is not finite.
        """
        functional.check_images(images)
        return functional.knn_prediction(self.votes(self.network.features(images)))


class DkNNClassifier(nn.Module):
    """Deep kNN (arXiv 1803.04765): the kNN votes of several layers summed (Eq. 4), with credibility (Eq. 5).

    Args:
        network: Gives the layers' features.
        banks: For each of the network's layers, the training images' features.
        k: Neighbours that vote in each layer; 75 in the paper.
        convention: How credibility counts ties.

    Raises:
        ValueError: If a layer has no bank or k exceeds one.
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
        missing = [layer for layer in network.layers if layer not in banks]
        if missing:
            raise ValueError(f"Expected a bank for each layer, but {missing} have none.")
        self.network, self.k, self.convention = network, k, convention
        self.queries = 0
        """Images that it has been asked about so far: what an attack costs its victim."""
        self.knns = nn.ModuleList(KNNClassifier(network, layer, banks[layer], k) for layer in network.layers)
        device = banks[network.layers[0]].labels.device
        empty = torch.empty(0, len(network.layers), dtype=torch.int64, device=device)
        self.register_buffer("calibration_votes", empty, persistent=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the voting layers, in the order of votes' second dimension."""
        return self.network.layers

    @property
    def banks(self) -> dict[str, MemoryBank]:
        """Each layer's bank by name; row m is the same training image in all of them."""
        knns = cast(Iterable[KNNClassifier], self.knns)
        return {knn.layer: knn.bank for knn in knns}

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
        return one.train(self.training)

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
    def forward(self, images: Tensor) -> Tensor:
        """Predicted classes int64 ``(B,)`` of images in [0, 1] (Eq. 4).

        Raises:
            ValueError: If an image is out of range or a feature is not finite.
        """
        functional.check_images(images)
        return functional.dknn_prediction(self.votes(self.network.features(images)))

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Batch]) -> None:
        """Keep the true-class votes ``(N, L)`` of the calibration images, for Eq. (5).

        Raises:
            ValueError: If an image is out of range or a feature is not finite.
        """
        device = self.calibration_votes.device
        parts = []
        for batch in tqdm(loader, desc="calibration", disable=None, leave=False):
            functional.check_images(batch.images)
            votes = self.votes(self.network.features(batch.images.to(device)))
            parts.append(functional.true_class_votes(votes, batch.labels.to(device)))
        self.calibration_votes = torch.cat(parts)

    def credibility(self, votes: Tensor) -> Tensor:
        """Credibility (Eq. 5) float64 ``(B,)`` of votes ``(B, L, C)``.

        Raises:
            ValueError: If `calibrate` has not run.
        """
        return functional.credibility(votes, self.calibration_votes.sum(1), self.convention)


@torch.no_grad()
def build_banks(
    network: FeatureNetwork,
    loader: Iterable[Batch],
    num_classes: int,
    metric: Metric = "cosine",
    backend: Backend = "auto",
    memory_gib: float | None = None,
    folder: Path | None = None,
    index: Mapping[str, int] | None = None,
) -> dict[str, MemoryBank]:
    """Store each layer's features of all images of a loader.

    Args:
        network: In evaluation mode.
        loader: The training images.
        num_classes: C.
        metric: Distance of the banks.
        backend: What scans them.
        memory_gib: Memory for banks and searches, of the network's device, in GiB; None for as much as it takes.
            Banks beyond it are kept on disk and read in blocks.
        folder: Where on disk; None for the system's temporary folder.
        index: Settings of an approximate backend, as of `MemoryBank`.

    Returns:
        A bank for each of the network's layers, on the network's device.

    Raises:
        ValueError: If an image is out of range, a feature is not finite, `memory_gib` is too little, or the backend
            cannot search such features.
        OSError: If the disk is full, or will be.
    """
    check_backend(backend)
    device = next(network.parameters()).device
    dataset: Any = getattr(loader, "dataset", None)  # of a DataLoader
    if dataset is None:
        loader = list(loader)
    total = sum(len(batch.ids) for batch in loader) if dataset is None else len(dataset)
    kept: dict[str, Tensor] = {}
    stored: dict[str, StoredRows] = {}
    # In one piece: what is kept of every batch would hold on to the memory that batches leave behind.
    labels, ids = torch.empty(2, total, dtype=torch.int64, device=device)
    start = 0
    for batch in tqdm(loader, desc="bank", disable=None, leave=False):
        functional.check_images(batch.images)
        features = network.features(batch.images.to(device))
        if not start:
            widths = {layer: rows.shape[1] for layer, rows in features.items()}
            fits = set(widths) if memory_gib is None else in_memory(total, widths, memory_gib, backend, index)
            for layer, width in widths.items():
                check_backend(backend, width, layer in fits)
                if layer in fits:
                    kept[layer] = torch.empty(total, width, device=device)
                else:
                    stored[layer] = StoredRows(width, torch.float32, folder, device)
            check_room(folder, total, {layer: widths[layer] for layer in stored}, backend)
        for layer, rows in features.items():
            if layer in kept:
                kept[layer][start : start + len(rows)] = rows
            else:
                stored[layer].append(rows)
        labels[start : start + len(batch.ids)] = batch.labels
        ids[start : start + len(batch.ids)] = batch.ids
        start += len(batch.ids)
    banks: dict[str, Tensor | StoredRows] = {**kept, **stored}
    return {
        layer: MemoryBank(banks[layer], labels[:start], ids[:start], num_classes, metric, backend, index)
        for layer in network.layers
    }
