"""The victims: kNN on one layer, DkNN on several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.choices import Backend, Convention, Metric
from lightning_advknn.data import Batch
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import (
    OUTPUT,
    FeatureNetwork,
    Frozen,
    Normalize,
)
from lightning_advknn.search import Bank
from lightning_advknn.search.build import check_batch


class DkNN(Frozen):
    """Deep kNN (arXiv 1803.04765): the kNN votes of several layers summed (Eq. 4), with credibility (Eq. 5).

    A kNN is a DkNN of one layer. It is always in evaluation mode.

    Args:
        model: Maps images in [0, 1] to anything; a layer's activations are what votes. It is put into evaluation mode.
        layers: Names of its submodules that vote, as in ``model.named_modules()``; None for its output alone.
        k: Neighbours that vote in each layer; 75 in the paper.
        metric: Distance of features.
        convention: How credibility counts ties.
        mean: Channel means of a normalisation before the model, of images in [0, 1]; None for none.
        std: Channel standard deviations of it.
        backend: What searches the banks. No vote depends on it, unless it is approximate.
        index: Settings of an approximate backend that differ from its defaults.
        memory_gib: Memory for banks and searches in GiB; banks beyond it are read from disk. None for no limit.
        device: Where `fit` puts all; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: If a layer does not exist, or a setting is none of its choices or no whole number.
    """

    calibration_votes: Tensor
    network: FeatureNetwork

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        k: int = 75,
        *,
        metric: Metric = "cosine",
        convention: Convention = "strict",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: Backend = "auto",
        index: Mapping[str, int] | None = None,
        memory_gib: float | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__()
        if convention not in get_args(Convention):
            raise ValueError(
                f"Expected `convention` to be one of {get_args(Convention)}, but got {convention!r}."
            )
        self.network = FeatureNetwork(model, layers or [OUTPUT], _normalization(mean, std))
        self.k = functional.whole("k", k)
        self.convention: Convention = convention
        self.metric: Metric = metric
        self.backend: Backend = backend
        self.index, self.memory_gib, self.device = index, memory_gib, device
        self.queries = 0
        """Images that it has been asked about so far: what an attack costs its victim."""
        self._banks = nn.ModuleList()  # by position, as names of modules must not have dots
        empty = torch.empty(0, len(self.layers), dtype=torch.int64)
        self.register_buffer("calibration_votes", empty, persistent=False)
        self.eval()

    @classmethod
    def on_banks(
        cls,
        network: FeatureNetwork,
        banks: Mapping[str, Bank],
        k: int = 75,
        convention: Convention = "strict",
    ) -> "DkNN":
        """A DkNN whose banks are there already.

        Args:
            network: Gives the layers' features.
            banks: For each of the network's layers, the training images' features; row m is the same image in all.
            k: Neighbours that vote in each layer; 75 in the paper.
            convention: How credibility counts ties.

        Raises:
            ValueError: If a layer has no bank, k exceeds one or is no whole number, or the convention is unknown.
        """
        missing = [layer for layer in network.layers if layer not in banks]
        if missing:
            raise ValueError(f"Expected a bank for each layer, but {missing} have none.")
        first = banks[network.layers[0]]
        victim = DkNN(
            network.network,
            network.layers,
            k,
            metric=first.metric,
            convention=convention,
            backend=first.backend,
            device=str(first.labels.device),
        )
        victim.network = network  # with its normalization
        victim._set_banks(banks)
        return victim

    def _set_banks(self, banks: Mapping[str, Bank]) -> None:
        for layer in self.layers:
            banks[layer].check_k(self.k)
        self._banks = nn.ModuleList(banks[layer] for layer in self.layers)
        self.calibration_votes = self.calibration_votes.to(banks[self.layers[0]].labels.device)
        self.eval()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the voting layers, in the order of votes' second dimension."""
        return self.network.layers

    @property
    def banks(self) -> dict[str, Bank]:
        """Each layer's bank by name; row m is the same training image in all of them."""
        return dict(zip(self.layers, cast(Iterable[Bank], self._banks), strict=True))

    @property
    def num_classes(self) -> int:
        """C."""
        return next(iter(self.banks.values())).num_classes

    def only(self, layer: str) -> "DkNN":
        """The kNN on one of the layers, as a DkNN of that layer alone; shares its bank.

        Raises:
            ValueError: If DkNN does not have the layer.
        """
        if layer not in self.layers:
            raise ValueError(f"Expected `layer` to be one of {list(self.layers)}, but got {layer!r}.")
        network = FeatureNetwork(self.network.network, [layer], self.network.normalize)
        one = DkNN.on_banks(network, self.banks, self.k, self.convention)
        position = self.layers.index(layer)
        one.calibration_votes = self.calibration_votes[:, position : position + 1]
        return one

    def votes(self, features: Mapping[str, Tensor]) -> Tensor:
        """Votes int64 ``(B, L, C)`` for features ``(B, D)`` by layer."""
        votes = torch.stack(
            [bank.votes(features[layer], self.k) for layer, bank in self.banks.items()], dim=1
        )
        self.queries += len(votes)
        return votes

    def search(self, features: Mapping[str, Tensor], k: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's k nearest rows, as `MemoryBank.search`: distances ``(B, k)`` and bank rows ``(B, k)``."""
        self.queries += len(next(iter(features.values())))
        return {layer: bank.search(features[layer], k) for layer, bank in self.banks.items()}

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 500) -> dict[str, Tensor]:
        """Features of images, float32 ``(B, D)`` by layer, in batches."""
        parts = [self.network.features(part) for part in torch.split(images, batch_size)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}

    @torch.no_grad()
    @float32_arithmetic()
    def forward(self, images: Tensor) -> Tensor:
        """Shares of the votes, float32 ``(B, C)``, of images in [0, 1]: what a black-box attack may ask.

        Raises:
            ValueError: If an image is out of range or unlike the bank's, or a feature is not finite.
        """
        self.check_images(images)
        votes = self.votes(self.network.features(images)).sum(1)
        return votes.float() / (self.k * len(self.layers))

    def predict(self, images: Tensor) -> Tensor:
        """Classes int64 ``(B,)`` of images in [0, 1] (Eq. 4); a tie goes to the lowest.

        Raises:
            ValueError: As `forward`.
        """
        # Equal counts are equal shares, so ties are exact.
        return functional.dknn_prediction(
            (self(images) * (self.k * len(self.layers))).round().long()[:, None]
        )

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

    def credibility_of(self, votes: Tensor) -> Tensor:
        """Credibility (Eq. 5) float64 ``(B,)`` of votes ``(B, L, C)``.

        Raises:
            ValueError: If `calibrate` has not run.
        """
        return functional.credibility(votes, self.calibration_votes.sum(1), self.convention)


def _normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"Expected `mean` and `std` together, but got {mean} and {std}.")
    return Normalize(mean, std)


def check_images_of(bank: Bank, images: Tensor) -> None:
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
