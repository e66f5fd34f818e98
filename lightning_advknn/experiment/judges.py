"""The victims on one backbone, kNN and DkNN, and what they say of images."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from lightning_advknn.attacks.parts.voronoi import exact_minimum, lower_bound
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import observe
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.ranks import Ranks
from lightning_advknn.search import Bank, Exchange, describe_index, recall
from lightning_advknn.search.build import BankSettings, build_banks, build_sharded_banks
from lightning_advknn.search.recall import RECALL_QUERIES
from lightning_advknn.storage import digest


class Judges:
    """DkNN on a backbone and the kNN on one of its layers: the attacked ones, or those of a transfer network.

    Args:
        name: `ORIGIN` or the transfer network's.
        networks: Among them the backbone.
        cache: Notes the wall time of building the bank.
        ranks: All of them build the bank, at the same time.
    """

    def __init__(self, name: str, networks: Networks, cache: StageCache, ranks: Ranks) -> None:
        self.name, self.networks, self.cache, self.ranks = name, networks, cache, ranks
        self.settings, self.data, self.device = networks.experiment.victim, networks.data, networks.device
        self.layer, self.layers = networks.knn_layer(name), networks.layers[name]
        self._exchange: Exchange | None = None  # of a bank whose rows lie on several ranks

    @cached_property
    def dknn(self) -> DkNN:
        """DkNN on all layers that vote; every rank asks for it at the same time.

        A bank whose rows lie on several ranks (`VictimSettings.shard`) is searched by `Exchange`: a rank
        that asks nothing must `wait` meanwhile.
        """
        settings, network = self.settings, self.networks.backbone(self.name)
        several, folder = self.ranks.size > 1, self.cache.folder / "bank"
        how = BankSettings(settings.metric, settings.backend, settings.index, settings.memory_gib, folder)
        exchange = Exchange(partial(self.ranks.barrier, "a search")) if several and settings.shard else None

        def make() -> Mapping[str, Bank]:
            about = network, self.data.loader("train", self.device), self.data.num_classes, how
            return build_sharded_banks(*about, exchange) if exchange else build_banks(*about, several)

        self.ranks.open(f"the bank of {self.name}", self.device)
        banks = self.cache.built(*self._bank, make)
        if exchange:
            self._exchange = exchange
        else:
            self.ranks.close()
        return DkNN.on_banks(network, banks, settings.k, settings.convention).to(self.device)

    @property
    def _bank(self) -> tuple[str, str]:
        """What its bank is called in the cache, and in the list of wall times."""
        return f"bank/{self.key}", self.label("build bank")

    def note_bank(self) -> None:
        """Note the wall time of the bank, if only an earlier run has built it."""
        self.cache.note_built(*self._bank)

    def prepare(self) -> None:
        """Build the bank, on all ranks at the same time."""
        _ = self.dknn

    def free(self) -> None:
        """Free the bank's memory. Of several ranks, all do so at the same time."""
        if self._exchange is not None:
            self._exchange.serve()
            self.ranks.close()
            self._exchange = None
        self.__dict__.pop("dknn", None)

    def wait(self, what: str) -> None:
        """Wait for all ranks, and answer meanwhile what they ask the bank."""
        if self._exchange is not None:
            self._exchange.serve()
        self.ranks.barrier(what)

    def victim(self, name: str) -> DkNN:
        """``dknn``, or ``knn`` as a DkNN of its layer alone."""
        return self.dknn if name == "dknn" else self.dknn.only(self.layer)

    def query(self, images: Tensor, rows: range | None = None) -> dict[str, Tensor]:
        """``dnn`` and ``votes`` of images, or of some consecutive ones among them, as `observe`."""
        dnn, votes = observe(self.dknn, images, rows=rows)
        return {**({} if dnn is None else {"dnn": dnn}), "votes": votes}

    def calibrate(self) -> dict[str, Tensor]:
        """``votes`` of the calibration images' own classes, int64 ``(N, L)``: what credibility compares with."""
        self.dknn.calibrate(self.data.loader("calibration", self.device))
        return {"votes": self.dknn.calibration_votes}

    @float32_arithmetic()
    def recall(self) -> dict[str, Tensor]:
        """By layer, the share of true neighbours that an approximate backend finds of validation images, float64."""
        split, banks = self.data.split("val"), self.dknn.banks
        images, _, _ = split.__getitems__(range(min(RECALL_QUERIES, len(split))))
        features = self.networks.backbone(self.name).features(images.to(self.device))
        return {layer: recall(banks[layer], features[layer], self.settings.k) for layer in self.layers}

    def bounds(self, layer: str, scale: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A lower bound of the L2 distance of every adversarial against the kNN on a layer of pixels.

        For k = 1 it is the exact minimum, else that of pixels without a range (`attacks.parts.voronoi`).

        Args:
            layer: One that votes; Euclidean.
            scale: Of its features, as `pixel_scale`.
            images: float32 ``(n, channels, H, W)`` on the device.
            labels: Their classes, int64 ``(n,)``.

        Returns:
            ``bounds``: true L2, float64 ``(n,)``; 0 where the kNN misclassifies the image itself.
        """
        knn, k = self.dknn.only(layer), self.settings.k
        bank = knn.banks[layer]
        known = (bank.features[:], bank.labels, knn.features(images)[layer], labels)
        if k == 1:
            norms = exact_minimum(*known, scale, images.flatten(1)).norms
        else:
            norms = lower_bound(*known, k, scale)
        return {"bounds": norms.masked_fill(knn.predict(images) != labels, 0)}

    @cached_property
    def index(self) -> dict[str, Any] | None:
        """The approximate backend with all its settings; None of an exact one, on which no vote depends."""
        return describe_index(self.settings.backend, len(self.data.split("train")), self.settings.index)

    @cached_property
    def approximation(self) -> dict[str, Any] | None:
        """The approximate backend, and by layer the share of true neighbours that it finds; None of an exact one.

        Of ``hnsw`` that is one index's share: another, made by several threads, is slightly different.
        """
        if self.index is None:
            return None
        found = self.cache.read(*self.recall_file)
        return {
            **self.index,
            "k": self.settings.k,
            "images": len(found[self.layers[0]]),
            "recall": {layer: round(found[layer].mean().item(), 4) for layer in self.layers},
        }

    @property
    def recall_file(self) -> tuple[str, str]:
        """Name and label of the stage that keeps `recall`."""
        return f"recall/{self.key}", self.label("measure recall")

    @cached_property
    def key(self) -> str:
        """Hash of all that votes depend on beside the image: not the exact backend, but what rounds the features."""
        return digest(
            {
                "backbone": self.networks.key(self.name),
                "layers": list(self.layers),
                "k": self.settings.k,
                "metric": self.settings.metric,
                **({"index": self.index} if self.index else {}),
                "arithmetic": arithmetic(self.device),
            }
        )

    def label(self, what: str) -> str:
        """Name of a stage on these judges."""
        return what if self.name == ORIGIN else f"{what} of {self.name}"
