"""The networks of an experiment: the attacked backbone, its surrogates, and backbones that only judge."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_advknn import __version__
from lightning_advknn.data import ImageDataModule
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.settings import ORIGIN, Experiment, Trained
from lightning_advknn.experiment.training import (
    instantiate,
    is_trained,
    load_or_fit,
    training_settings,
)
from lightning_advknn.models import FeatureNetwork, JointSurrogate, Surrogate, kept_modes
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checks import check_network, check_on_data
from lightning_advknn.search.index_settings import APPROXIMATE
from lightning_advknn.storage import digest, file_digest, weights_digest
from lightning_advknn.training_cli import AdvKNNCLI


class Networks:
    """All networks by name: `ORIGIN`, surrogates, transfer networks. Each is trained or loaded at its first use.

    Args:
        experiment: What is trained on what.
        device: Where all of them run.
        cache: Folder of checkpoints, and the wall time of trainings.

    Raises:
        ValueError: If a configuration is invalid, a checkpoint is of something else, or a layer does not exist.
        FileNotFoundError: If a checkpoint is missing.
    """

    def __init__(self, experiment: Experiment, device: torch.device, cache: StageCache) -> None:
        self.experiment, self.device, self.cache = experiment, device, cache
        self.backbones = (ORIGIN, *experiment.transfer)
        self.trainings: dict[str, AdvKNNCLI] = {
            name: instantiate(
                self.trained(name),
                SurrogateModule if name in experiment.surrogates else BackboneModule,
                experiment.seed,
                experiment.root,
                device,
            )
            for name in (ORIGIN, *experiment.surrogates, *experiment.transfer)
        }
        self.layers = {name: self._layers(name) for name in self.backbones}
        """By backbone, the layers that vote in its DkNN."""
        self._backbones: dict[str, FeatureNetwork] = {}
        self._surrogates: dict[str, Surrogate] = {}
        self._keys: dict[str, str] = {}

    @cached_property
    def data(self) -> ImageDataModule:
        """The data, shared by all trainings."""
        data: ImageDataModule = self.trainings[ORIGIN].datamodule
        return data

    @property
    def methods(self) -> tuple[str, ...]:
        """What attacks on logits differentiate: `ORIGIN`, then each surrogate by name."""
        return (ORIGIN, *self.experiment.surrogates, *self.experiment.joint)

    def trained(self, name: str) -> Trained:
        """How a network is made; surrogates imitate the victim's kNN unless their configuration says otherwise."""
        if name == ORIGIN:
            return self.experiment.backbone
        if name in self.experiment.transfer:
            return self.experiment.transfer[name].backbone
        trained, victim = self.experiment.surrogates[name], self.experiment.victim
        victims: dict[str, Any] = {"k": victim.k, "metric": victim.metric}
        if victim.backend in APPROXIMATE and "backend" not in trained.overrides:
            victims |= {"backend": victim.backend, "index": victim.index}
        return replace(trained, overrides={**victims, **trained.overrides})

    def checkpoint(self, name: str) -> Path:
        """Where a network's checkpoint is or will be; of a surrogate, the backbone is trained first if it has to be."""
        if given := self.trained(name).checkpoint:
            return Path(given)
        settings = training_settings(self.trainings[name])
        if name in self.backbones:
            key = digest([settings, self.data.fingerprint, __version__])
            return self.cache.folder / "backbone" / f"{key}.ckpt"
        return self.cache.folder / "surrogate" / f"{digest([settings, self.key(ORIGIN)])}.ckpt"

    def missing(self, name: str) -> bool:
        """Whether a network has still to be trained."""
        return not self.trained(name).checkpoint and not is_trained(self.checkpoint(name))

    def backbone(self, name: str = ORIGIN) -> FeatureNetwork:
        """A trained backbone with the layers that vote, on the device."""
        if name not in self._backbones:
            network = self._load(name).network.network
            self._backbones[name] = FeatureNetwork(network, self.layers[name]).to(self.device)
            self._check_function(name, self._backbones[name])
        return self._backbones[name]

    def key(self, name: str) -> str:
        """Hash of what a trained backbone computes, and on which images."""
        if name not in self._keys:
            settings = training_settings(self.trainings[name])
            architecture = settings["model"]["init_args"]["network"]
            code = [settings["code"]] if "code" in settings else []
            weights = weights_digest(self.backbone(name))
            self._keys[name] = digest([architecture, weights, self.data.fingerprint, __version__, *code])
        return self._keys[name]

    def surrogate_module(self, name: str) -> SurrogateModule:
        """A surrogate's module with the trained backbone's weights, not yet trained or loaded itself."""
        module: SurrogateModule = self.trainings[name].model
        _ = self.backbone()
        module.backbone_checkpoint = self.checkpoint(ORIGIN)
        module.load_backbone(self.data.name)
        return module

    def surrogate(self, name: str) -> Surrogate:
        """A trained surrogate on the device."""
        if name not in self._surrogates:
            self.surrogate_module(name)
            self._surrogates[name] = self._load(name).surrogate.to(self.device)
        return self._surrogates[name]

    def logits_fn(self, method: str) -> FeatureNetwork | Surrogate | JointSurrogate:
        """What attacks on a method differentiate."""
        if method in self.experiment.joint:
            parts = [self.surrogate(part) for part in self.experiment.joint[method]]
            return JointSurrogate(self.backbone().network, {part.layer: part.dknnb for part in parts})
        return self.backbone() if method == ORIGIN else self.surrogate(method)

    def load_given(self) -> None:
        """Load the checkpoints that are there, so that one that does not fit is refused before anything long runs.

        Raises:
            ValueError: If one does not fit, or a surrogate's is given without the backbone's.
        """
        for name in self.backbones:
            if self.checkpoint(name).is_file():
                self.backbone(name)
        given = [name for name in self.experiment.surrogates if self.trained(name).checkpoint]
        if self.checkpoint(ORIGIN).is_file():
            for name in given:
                self.surrogate(name)
        elif given:
            raise ValueError(
                f"Expected `backbone.checkpoint` beside the checkpoint of {', '.join(given)}: a surrogate"
                " belongs to one backbone. Give the backbone that it was trained on."
            )

    def check_functions(self) -> None:
        """Raise a ValueError unless each untrained backbone is a function of the image (`check_function`)."""
        for name in self.backbones:
            module: Any = self.trainings[name].model
            with kept_modes(module.network):
                self._check_function(name, FeatureNetwork(module.network.network, self.layers[name]))

    def describe(self) -> dict[str, Any]:
        """Settings of all trainings and hashes of given checkpoints, as plain values."""
        given = {name: self.trained(name).checkpoint for name in self.trainings}
        return {
            "trainings": {name: training_settings(cli) for name, cli in self.trainings.items()},
            "checkpoints": {name: file_digest(Path(path)) for name, path in given.items() if path},
        }

    def _layers(self, name: str) -> tuple[str, ...]:
        module: Any = self.trainings[name].model
        layers, chosen = module.network.layers, self.experiment.victim.layers
        if name == ORIGIN and chosen is not None:
            try:
                with kept_modes(module.network):  # it may still have to be trained
                    network = FeatureNetwork(module.network.network, chosen)
                    check_network(network, module.image_shape, module.num_classes)
            except ValueError as error:
                raise ValueError(f"`victim.layers`: {error}") from error
            layers = network.layers
        setting = "victim.layer" if name == ORIGIN else f"transfer.{name}.layer"
        layer = self.knn_layer(name)
        if layer not in layers:
            raise ValueError(f"Expected `{setting}` to be one of {list(layers)}, but got {layer!r}.")
        found: tuple[str, ...] = layers
        return found

    def knn_layer(self, name: str) -> str:
        """The layer of the kNN on a backbone."""
        return self.experiment.victim.layer if name == ORIGIN else self.experiment.transfer[name].layer

    def _load(self, name: str) -> Any:
        """A network's module, trained or loaded."""
        trained, checkpoint = self.trained(name), self.checkpoint(name)
        return load_or_fit(self.trainings[name], trained, checkpoint, self.experiment.seed, self.cache, name)

    def _check_function(self, name: str, network: FeatureNetwork) -> None:
        try:
            check_on_data(network, self.data)
        except ValueError as error:
            raise ValueError(f"The network of {name} cannot be judged. {error}") from error
