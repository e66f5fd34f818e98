"""The stages of an experiment, each saved once under a key of all it depends on."""

import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lightning_advknn import __version__
from lightning_advknn.classifiers import DkNNClassifier, build_banks
from lightning_advknn.data import ImageDataModule
from lightning_advknn.data.base import ImageSplit
from lightning_advknn.evaluation import (
    Rows,
    Verdicts,
    concatenate,
    decide,
    make_rows,
    observe,
    perturb,
)
from lightning_advknn.experiment.settings import Experiment, Trained
from lightning_advknn.experiment.training import fit, instantiate, training_settings
from lightning_advknn.models import FeatureNetwork, Surrogate
from lightning_advknn.modules import BackboneModule, SurrogateModule, load_weights
from lightning_advknn.search import check_backend
from lightning_advknn.storage import atomic_path, check_writable, digest, file_digest, weights_digest

T = TypeVar("T")

SHARD = 1000  # images attacked or queried between two saves
ORIGIN = "origin"  # the paper's name for attacking the backbone itself


class ExperimentRun:
    """Runs the stages of an experiment, each at its first use.

    Args:
        experiment: What to run.

    Raises:
        ValueError: If anything in it cannot work, before any long work starts.
        OSError: If a file is missing or the cache cannot be written.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.cache = Path(experiment.cache)
        self._seconds: dict[str, tuple[str, float]] = {}  # by file: its stage and own wall time
        self._nested = 0.0  # wall time of stages that ran inside the one that is running
        check_writable(self.cache)
        self.device = _device(experiment.device)
        _check_names(experiment)
        check_backend(experiment.victim.backend)
        self._attacks = {name: attack.bind() for name, attack in experiment.attacks.items()}
        self._trainings = {
            name: instantiate(trained, kind, experiment.seed, experiment.root, self.device)
            for name, trained, kind in (
                (ORIGIN, experiment.backbone, BackboneModule),
                *((name, self._trained(name), SurrogateModule) for name in experiment.surrogates),
            )
        }
        self.data: ImageDataModule = self._trainings[ORIGIN].datamodule
        self.data.prepare_data()
        self._check_settings()
        self._load_given()

    def _check_settings(self) -> None:
        victim = self.experiment.victim
        layers = self._trainings[ORIGIN].model.network.layers
        if victim.layer not in layers:
            raise ValueError(
                f"Expected `victim.layer` to be one of {list(layers)}, but got {victim.layer!r}."
            )
        rows = len(self.data.split("train"))
        if not 1 <= victim.k <= rows:
            raise ValueError(
                f"Expected `victim.k` to be in [1, {rows}] (the bank's rows), but got {victim.k}."
            )
        for name in self.experiment.surrogates:
            cli = self._trainings[name]
            if cli.datamodule.fingerprint != self.data.fingerprint:
                raise ValueError(
                    f"Expected {name} to be configured with the backbone's data and splits, but its"
                    f" {cli.datamodule.name} differs. Give both configurations the same `data`."
                )
            if not 1 <= cli.model.k < rows:
                raise ValueError(
                    f"Expected {name}'s k to be in [1, {rows - 1}] (the bank's rows less the image's own), but got"
                    f" {cli.model.k}."
                )

    def _load_given(self) -> None:
        """Load what is there already, so that a checkpoint that does not fit is refused now."""
        given = [name for name in self.experiment.surrogates if self._trained(name).checkpoint]
        if self._checkpoint(ORIGIN).is_file():
            _ = self.backbone
            for name in given:
                self._surrogate(name)
        elif given:
            raise ValueError(
                f"Expected `backbone.checkpoint` beside the checkpoint of {', '.join(given)}: a surrogate belongs to one"
                " backbone. Give the backbone that it was trained on."
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """What attacks differentiate: ``origin``, then each surrogate by name."""
        return (ORIGIN, *self.experiment.surrogates)

    @property
    def test(self) -> ImageSplit:
        """The test images."""
        return self.data.split("test")

    def describe(self) -> dict[str, Any]:
        """Everything the results depend on, as plain values; equal for equal experiments."""
        experiment = self.experiment
        return {
            "trainings": {name: training_settings(cli) for name, cli in self._trainings.items()},
            "checkpoints": {
                name: file_digest(self._checkpoint(name))
                for name in self.methods
                if self._trained(name).checkpoint
            },
            "victim": {
                k: v for k, v in asdict(experiment.victim).items() if k not in ("backend", "memory_gib")
            },
            "attacks": {name: asdict(attack) for name, attack in experiment.attacks.items()},
            "label_source": experiment.label_source,
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "version": __version__,
        }

    @cached_property
    def backbone(self) -> FeatureNetwork:
        """The trained backbone with its layers, on the device, in evaluation mode."""
        network: FeatureNetwork = self._train(ORIGIN).network
        return network.to(self.device).eval()

    @cached_property
    def surrogates(self) -> dict[str, Surrogate]:
        """The trained surrogates by name, on the device, in evaluation mode."""
        return {name: self._surrogate(name) for name in self.experiment.surrogates}

    @cached_property
    def dknn(self) -> DkNNClassifier:
        """DkNN on all layers of the backbone."""
        settings = self.experiment.victim
        make = partial(
            build_banks,
            self.backbone,
            self.data.loader("train"),
            self.data.num_classes,
            settings.metric,
            settings.backend,
            settings.memory_gib,
            self.cache / "bank",
        )
        banks, seconds = self._measured(make)
        self._seconds["bank"] = "build bank", seconds
        dknn = DkNNClassifier(self.backbone, banks, settings.k, settings.convention)
        return dknn.to(self.device).eval()

    def seconds(self) -> dict[str, float]:
        """Wall time by stage, also of stages that an earlier run made and this one read."""
        total: dict[str, float] = {}
        for stage, seconds in self._seconds.values():
            total[stage] = total.get(stage, 0.0) + seconds
        return total

    def logits_fn(self, method: str) -> FeatureNetwork | Surrogate:
        """What a method's attacks differentiate."""
        return self.backbone if method == ORIGIN else self.surrogates[method]

    def rows(self, method: str, attack: str | None) -> Rows:
        """One row per test image, columns as in `evaluation.Rows`, on the CPU.

        Args:
            method: One of `methods`.
            attack: Name of an attack; None leaves the images as they are.
        """
        starts = range(0, len(self.test), SHARD)
        progress = tqdm(starts, desc=f"{method}/{attack or 'clean'}", disable=None, leave=False)
        return concatenate([self._rows_shard(method, attack, start) for start in progress])

    def adversarial(self, method: str, attack: str | None, start: int) -> Tensor:
        """The stored float32 adversarials of the `SHARD` test images from `start` on, on the device."""
        images, _, _ = self._shard(start)
        if attack is None:
            return images
        stored = self._stage(
            f"adversarial/{self._adversarial_key(method, attack)}/{_name(start)}",
            f"attack {method}/{attack}",
            lambda: {"adversarial": self._attack(method, attack, start)},
        )
        return stored["adversarial"].to(self.device)

    def images_of(self, method: str, attack: str, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean and adversarial images of some rows, float32 ``(n, channels, H, W)``."""
        images, _, _ = self.test.__getitems__(positions)
        adversarial = [
            self.adversarial(method, attack, position - position % SHARD)[position % SHARD]
            for position in positions
        ]
        return images.to(self.device), torch.stack(adversarial)

    def _rows_shard(self, method: str, attack: str | None, start: int) -> Rows:
        images, labels, ids = self._shard(start)
        before, after = self._verdicts(None, None, start), self._verdicts(method, attack, start)
        adversarial = self.adversarial(method, attack, start)
        surrogate = None if method == ORIGIN else self.surrogates[method]
        rows = make_rows(ids, labels, images, adversarial, before, after, surrogate)
        return {name: column.cpu() for name, column in rows.items()}

    def _verdicts(self, method: str | None, attack: str | None, start: int) -> Verdicts:
        clean = method is None or attack is None
        images_key = "clean" if clean else self._adversarial_key(method or "", attack or "")

        def query() -> dict[str, Tensor]:
            images = self.adversarial(method or ORIGIN, attack, start)
            dnn, votes = observe(self.dknn, images)
            return {"dnn": dnn, "votes": votes}

        label = "clean" if clean else f"{method}/{attack}"
        key = digest([images_key, self._victim_key])
        found = self._stage(f"observations/{key}/{_name(start)}", f"query {label}", query)
        settings = self.experiment.victim
        return decide(
            found["dnn"].to(self.device),
            found["votes"].to(self.device),
            self.backbone.layers.index(settings.layer),
            self._calibration_votes,
            settings.convention,
        )

    @cached_property
    def _calibration_votes(self) -> Tensor:
        def query() -> dict[str, Tensor]:
            self.dknn.calibrate(self.data.loader("calibration"))
            return {"votes": self.dknn.calibration_votes}

        name = f"calibration/{self._victim_key}"
        return self._stage(name, "query calibration", query)["votes"].to(self.device)

    @cached_property
    def _victim_key(self) -> str:
        settings = self.experiment.victim
        return digest(
            {
                "backbone": self._backbone_key,
                "layers": list(self.backbone.layers),
                "k": settings.k,
                "metric": settings.metric,
            }
        )

    def _attack(self, method: str, attack: str, start: int) -> Tensor:
        images, labels, _ = self._shard(start)
        if self.experiment.label_source == "knn":
            labels = self._verdicts(None, None, start).knn
        precision = self.experiment.attacks[attack].precision
        return perturb(self._attacks[attack], self.logits_fn(method), images, labels, precision)

    def _adversarial_key(self, method: str, attack: str) -> str:
        settings = self.experiment.victim
        knn = [settings.layer, settings.k, settings.metric]
        return digest(
            {
                "backbone": self._backbone_key,
                "attacked": weights_digest(self.logits_fn(method)),
                "attack": asdict(self.experiment.attacks[attack]),
                "layer": ORIGIN if method == ORIGIN else self.surrogates[method].layer,
                "labels": knn if self.experiment.label_source == "knn" else "true",
            }
        )

    @cached_property
    def _backbone_key(self) -> str:
        """Hash of what the trained backbone computes, and on which images."""
        architecture = training_settings(self._trainings[ORIGIN])["model"]["init_args"]["network"]
        return digest([architecture, weights_digest(self.backbone), self.data.fingerprint, __version__])

    def _shard(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and ids of the test images from `start` on, on the device."""
        rows = range(start, min(start + SHARD, len(self.test)))
        images, labels, ids = self.test.__getitems__(rows)
        return images.to(self.device), labels.to(self.device), ids.to(self.device)

    def _stage(self, name: str, label: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors kept in the cache under a name that holds their key, made if they are not there."""
        path = self.cache / f"{name}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as kept:
                    metadata = kept.metadata()
                    tensors = {name: kept.get_tensor(name) for name in kept.keys()}
                self._seconds[name] = metadata["stage"], float(metadata["seconds"])
                return tensors
            except SafetensorError as error:
                warnings.warn(f"{path} is damaged ({error}) and is made again.", stacklevel=2)
        made, seconds = self._measured(make)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"stage": label, "seconds": f"{seconds:.3f}"})
        self._seconds[name] = label, seconds
        return tensors

    def _measured(self, make: Callable[[], T]) -> tuple[T, float]:
        """A result and the wall time that making it took, without that of stages it had to wait for."""
        outer, self._nested = self._nested, 0.0
        started = time.perf_counter()
        result = make()
        elapsed = time.perf_counter() - started
        own = elapsed - self._nested
        self._nested = outer + elapsed
        return result, own

    def _surrogate(self, name: str) -> Surrogate:
        backbone_key = self._backbone_key  # trains the backbone first, if it has to be
        module = self._trainings[name].model
        module.backbone_checkpoint = self._checkpoint(ORIGIN)
        module.load_backbone(self.data.name)
        votes_key = digest([backbone_key, module.layer, module.k, module.metric])
        module.votes_file = self.cache / "votes" / votes_key
        surrogate: Surrogate = self._train(name).surrogate
        return surrogate.to(self.device).eval()

    def _trained(self, name: str) -> Trained:
        """How a module is made; surrogates imitate the victim's kNN unless they say otherwise."""
        if name == ORIGIN:
            return self.experiment.backbone
        trained, victim = self.experiment.surrogates[name], self.experiment.victim
        return replace(trained, overrides={"k": victim.k, "metric": victim.metric, **trained.overrides})

    def _checkpoint(self, name: str) -> Path:
        """Where a module's checkpoint is or will be."""
        given = self._trained(name).checkpoint
        if given:
            return Path(given)
        settings = training_settings(self._trainings[name])
        if name == ORIGIN:
            return self.cache / "backbone" / f"{digest([settings, self.data.fingerprint, __version__])}.ckpt"
        return self.cache / "surrogate" / f"{digest([settings, self._backbone_key])}.ckpt"

    def _train(self, name: str) -> Any:
        """The module with its trained weights: loaded, or trained from its configuration and kept."""
        cli, checkpoint, trained = self._trainings[name], self._checkpoint(name), self._trained(name)
        if not checkpoint.is_file():
            fit(cli, trained, checkpoint, self.experiment.seed)
        module = cli.model
        load_weights(module, checkpoint, module.identity(self.data.name))
        if not trained.checkpoint:
            facts = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
            self._seconds[str(checkpoint)] = f"train {name}", facts["seconds"]
        return module


def _check_names(experiment: Experiment) -> None:
    """Raise a ValueError unless names of surrogates and attacks can name files and table cells."""
    if not experiment.attacks:
        raise ValueError("Expected at least one attack in `attacks`, but got none.")
    for kind, names, reserved in (
        ("surrogate", experiment.surrogates, (ORIGIN, "dnn", "knn", "dknn", "surrogate")),
        ("attack", experiment.attacks, ("clean",)),
    ):
        for name in names:
            if name in reserved or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"Expected the name of each {kind} to have letters, digits, `_` and `-` only and not to be one of"
                    f" {list(reserved)}, which mean something else, but got {name!r}."
                )


def _name(start: int) -> str:
    return f"{start:06d}-{start + SHARD:06d}"


def _device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(0, device=name, dtype=torch.float64).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        return device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected `device` to be one that torch can use here, with float64, but {name!r}: {error}"
        ) from error
