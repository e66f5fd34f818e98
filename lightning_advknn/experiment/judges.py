"""The classifiers on one trained network, and what they said of images."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_advknn import __version__
from lightning_advknn.attacks.parts.voronoi import ALGORITHM, exact_minimum, lower_bound
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import ImageDataModule
from lightning_advknn.evaluation import Verdicts, decide, observe
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.settings import ORIGIN, Experiment, Trained
from lightning_advknn.experiment.training import instantiate, load_or_fit, training_settings
from lightning_advknn.models import FeatureNetwork, kept_modes
from lightning_advknn.modules import BackboneModule
from lightning_advknn.modules.checks import check_network, check_on_data
from lightning_advknn.ranks import Ranks
from lightning_advknn.search import Exchange, describe_index, recall
from lightning_advknn.search.build import build_banks
from lightning_advknn.storage import digest, weights_digest

QUERIES = 100  # validation images on which recall is measured


class Victims:
    """A trained backbone (the DNN) with its kNN and DkNN: those under attack, or those of a transfer network.

    Args:
        name: ``origin`` or the transfer network's.
        trained: The backbone.
        layer: Layer of the kNN.
        experiment: k, metric and the like, seed, data files.
        device: Where all of it runs.
        cache: Keeps what they said.
        ranks: Who makes the bank: all of them, at the same time.

    Raises:
        ValueError: If the configuration is invalid or the checkpoint of something else, or the layer does not exist.
        FileNotFoundError: If the checkpoint is missing.
    """

    def __init__(
        self,
        name: str,
        trained: Trained,
        layer: str,
        experiment: Experiment,
        device: torch.device,
        cache: StageCache,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.name, self.trained, self.layer = name, trained, layer
        self.settings, self.seed = experiment.victim, experiment.seed
        self.device, self.cache = device, cache
        self._exchange: Exchange | None = None  # of a bank that lies on several ranks
        self.cli = instantiate(trained, BackboneModule, experiment.seed, experiment.root, device)
        self.data: ImageDataModule = self.cli.datamodule
        module: Any = self.cli.model
        self.layers: tuple[str, ...] = module.network.layers
        if name == ORIGIN and self.settings.layers is not None:
            try:
                with kept_modes(module.network):  # it may still have to be trained
                    network = FeatureNetwork(module.network.network, self.settings.layers)
                    check_network(network, module.image_shape, module.num_classes)
            except ValueError as error:
                raise ValueError(f"`victim.layers`: {error}") from error
            self.layers = network.layers
        if layer not in self.layers:
            given = "victim.layer" if name == ORIGIN else f"transfer.{name}.layer"
            raise ValueError(f"Expected `{given}` to be one of {list(self.layers)}, but got {layer!r}.")

    def check(self) -> None:
        """Raise a ValueError unless the untrained network is a function of the image, as `check_function`."""
        module: Any = self.cli.model
        with kept_modes(module.network):
            self._check(FeatureNetwork(module.network.network, self.layers))

    def _check(self, network: FeatureNetwork) -> None:
        try:
            check_on_data(network, self.data)
        except ValueError as error:
            raise ValueError(f"The network of {self.name} cannot be judged. {error}") from error

    @property
    def checkpoint(self) -> Path:
        """Where the backbone's checkpoint is or will be."""
        if self.trained.checkpoint:
            return Path(self.trained.checkpoint)
        key = digest([training_settings(self.cli), self.data.fingerprint, __version__])
        return self.cache.folder / "backbone" / f"{key}.ckpt"

    @cached_property
    def network(self) -> FeatureNetwork:
        """The trained backbone with the layers that vote, on the device."""
        module = load_or_fit(self.cli, self.trained, self.checkpoint, self.seed, self.cache, self.name)
        network = FeatureNetwork(module.network.network, self.layers).to(self.device)
        self._check(network)
        return network

    @cached_property
    def network_key(self) -> str:
        """Hash of what the trained backbone computes, and on which images."""
        settings = training_settings(self.cli)
        architecture = settings["model"]["init_args"]["network"]
        code = [settings["code"]] if "code" in settings else []
        return digest([architecture, weights_digest(self.network), self.data.fingerprint, __version__, *code])

    @cached_property
    def dknn(self) -> DkNN:
        """DkNN on all layers that vote; every rank asks for it at the same time.

        A bank of which each rank has some rows (`VictimSettings.shard`) is searched by `Exchange`: a rank that asks nothing
        must `wait` meanwhile.
        """
        settings, network = self.settings, self.network
        over_ranks: Literal["copy"] | Exchange | None = None
        if self.ranks.size > 1:
            meet = partial(self.ranks.barrier, "a search")
            over_ranks = Exchange(meet) if settings.shard else "copy"
        make = partial(
            build_banks,
            network,
            self.data.loader("train"),
            self.data.num_classes,
            settings.metric,
            settings.backend,
            settings.memory_gib,
            self.cache.folder / "bank",
            self.settings.index,
            over_ranks,
        )
        self.ranks.open(f"the bank of {self.name}")
        banks = self.cache.measured(f"bank/{self.name}", self._stage("build bank"), make)
        if isinstance(over_ranks, Exchange):
            self._exchange = over_ranks
        else:
            self.ranks.close()
        dknn = DkNN.on_banks(network, banks, settings.k, settings.convention)
        return dknn.to(self.device)

    def free(self) -> None:
        """Let the bank's memory go; it is made again when it is asked again. Of several ranks, all do so at the same time."""
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

    def verdicts(self, key: str, label: str, shard: str, images: Callable[[], Tensor]) -> Verdicts:
        """What they say of images, which they are asked once.

        Args:
            key: Hash of what the images are.
            label: The same in words, such as ``origin/fgsm``.
            shard: Which of them, as a file's name.
            images: Gives them, float32 ``(n, channels, H, W)`` on the device.
        """

        def query() -> dict[str, Tensor]:
            return self.query(images())

        found = self.cache.tensors(*self.observation(key, label, shard), query)
        return decide(
            found["dnn"].to(self.device),
            found["votes"].to(self.device),
            self.network.layers.index(self.layer),
            self.calibration_votes,
            self.settings.convention,
        )

    def query(self, images: Tensor, rows: range | None = None) -> dict[str, Tensor]:
        """``dnn`` and ``votes`` of images, or of some consecutive ones among them, as `observe`."""
        dnn, votes = observe(self.dknn, images, rows=rows)
        return {"dnn": dnn, "votes": votes}

    def observation(self, key: str, label: str, shard: str) -> tuple[str, str]:
        """Name and stage of what is kept of `verdicts`; arguments as there."""
        return f"observations/{digest([key, self._key])}/{shard}", self._stage(f"query {label}")

    @property
    def calibration(self) -> tuple[str, str]:
        """Name and stage of what is kept of `calibration_votes`."""
        return f"calibration/{self._key}", self._stage("query calibration")

    @cached_property
    def calibration_votes(self) -> Tensor:
        """Votes of the calibration images' own classes, int64 ``(N, L)``, on the device: what credibility compares with."""
        return self.cache.tensors(*self.calibration, self.calibrate)["votes"].to(self.device)

    def calibrate(self) -> dict[str, Tensor]:
        """What `calibration_votes` keeps, asked now."""
        self.dknn.calibrate(self.data.loader("calibration"))
        return {"votes": self.dknn.calibration_votes}

    @cached_property
    def index(self) -> dict[str, Any] | None:
        """The approximate backend with all its settings; None of an exact one, on which no vote depends."""
        return describe_index(self.settings.backend, len(self.data.split("train")), self.settings.index)

    @cached_property
    def approximation(self) -> dict[str, Any] | None:
        """The approximate backend, and by layer the share of true neighbours that it finds of validation images.

        Of ``hnsw`` that is one index's share: another, made by several threads, is slightly different.
        """
        if self.index is None:
            return None
        found = self.cache.tensors(*self.recall_file, self.measure_recall)
        return {
            **self.index,
            "k": self.settings.k,
            "images": len(found[self.layers[0]]),
            "recall": {layer: round(found[layer].mean().item(), 4) for layer in self.layers},
        }

    @property
    def recall_file(self) -> tuple[str, str]:
        """Name and stage of what is kept of `measure_recall`."""
        return f"recall/{self._key}", self._stage("measure recall")

    def measure_recall(self) -> dict[str, Tensor]:
        """Share of true neighbours found of each image, float64, by layer."""
        split, banks = self.data.split("val"), self.dknn.banks
        images, _, _ = split.__getitems__(range(min(QUERIES, len(split))))
        features = self.network.features(images.to(self.device))
        return {layer: recall(banks[layer], features[layer], self.settings.k) for layer in self.layers}

    def bounds(self, layer: str, scale: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far from images all that fools the kNN on a layer of pixels is at least.

        For k = 1 that is the exact minimum for pixels without a range, else a lower bound of it
        (`attacks.voronoi`).

        Args:
            layer: One that votes; Euclidean.
            scale: Of its features, as `pixel_scale`.
            images: float32 ``(n, channels, H, W)`` on the device.
            labels: Their classes, int64 ``(n,)``.

        Returns:
            ``bounds``: true L2, float64 ``(n,)``; 0 where the kNN gets the image itself wrong.
        """
        knn, k = self.dknn.only(layer), self.settings.k
        bank = knn.banks[layer]
        known = (bank.features[:], bank.labels, knn.features(images)[layer], labels)
        norms = exact_minimum(*known, scale).norms if k == 1 else lower_bound(*known, k, scale)
        return {"bounds": norms.masked_fill(knn.predict(images) != labels, 0)}

    def bound_file(self, layer: str, shard: str) -> tuple[str, str]:
        """Name and stage of what is kept of `bounds` on a layer.

        Args:
            layer: Which.
            shard: Which of the test images, as a file's name.
        """
        key = digest([self.network_key, layer, self.settings.k, self.settings.metric, ALGORITHM])
        return f"bounds/{key}/{shard}", self._stage(f"bound knn/{layer}")

    @cached_property
    def _key(self) -> str:
        """Hash of all that their votes depend on, beside the image. Not the exact backend, but what rounds the features."""
        return digest(
            {
                "backbone": self.network_key,
                "layers": list(self.network.layers),
                "k": self.settings.k,
                "metric": self.settings.metric,
                **({"index": self.index} if self.index else {}),
                "arithmetic": arithmetic(self.device),
            }
        )

    def _stage(self, what: str) -> str:
        return what if self.name == ORIGIN else f"{what} of {self.name}"
