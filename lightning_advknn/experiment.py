"""The stages of an experiment, each saved once under a key of all it depends on.

Backbone -> surrogates -> adversarials -> observations -> rows. A key hashes contents (weights, images, settings),
so a changed setting redoes what depends on it and nothing else, and nothing stale is ever read. Test images are
attacked and queried in shards, each a file that is whole or not there: an interrupted run goes on where it stopped.
The bank is not saved: making it again takes seconds, reading its gigabytes back would take as long.
"""

import datetime
import inspect
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse.typing import Path_fr
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lightning_advknn import __version__, attacks
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.classifiers import DkNNClassifier, build_banks
from lightning_advknn.cli import AdvKNNCLI
from lightning_advknn.data import ImageDataModule
from lightning_advknn.data.base import ImageSplit
from lightning_advknn.evaluation import (
    Attack,
    LabelSource,
    Rows,
    Verdicts,
    concatenate,
    decide,
    make_rows,
    observe,
    perturb,
)
from lightning_advknn.functional import Convention
from lightning_advknn.models import FeatureNetwork, Surrogate
from lightning_advknn.modules import BackboneModule, SurrogateModule, load_weights
from lightning_advknn.search import Backend, Metric
from lightning_advknn.storage import (
    atomic_path,
    check_writable,
    digest,
    weights_digest,
    write_json,
)

T = TypeVar("T")

SHARD = 1000  # images attacked or queried between two saves
ORIGIN = "origin"  # the paper's name for attacking the backbone itself

# Parts of a train.py configuration that say where things are or go, not what comes out.
_PLACES = {
    "data": {"root", "download", "verify_checksums", "eval_batch_size"},
    "trainer": {"logger", "default_root_dir", "accelerator", "enable_progress_bar", "enable_model_summary"},
    "model": {"backbone_checkpoint", "votes_file", "backend"},
}


@dataclass(frozen=True)
class Trained:
    """A module that is loaded, or trained if it has not been.

    Args:
        config: A train.py configuration.
        overrides: Arguments of the module that differ from the configuration's.
        checkpoint: Load this instead of training.
    """

    config: Path_fr
    overrides: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class VictimSettings:
    """The kNN and DkNN under attack; DkNN votes with the backbone configuration's layers.

    Args:
        layer: Layer of the kNN.
        k: Neighbours that vote.
        metric: Their distance.
        backend: What scans the bank; no vote depends on it.
        convention: How credibility counts ties.
    """

    layer: str = "relu3"
    k: int = 75
    metric: Metric = "cosine"
    backend: Backend = "torch"
    convention: Convention = "strict"


@dataclass(frozen=True)
class AttackSettings:
    """An attack of `lightning_advknn.attacks` with its settings.

    Args:
        function: Its name.
        settings: Its keyword arguments.
    """

    function: str
    settings: dict[str, int | float] = field(default_factory=dict)

    def bind(self) -> Attack:
        """The attack as a function of logits function, images and labels.

        Raises:
            ValueError: If the function or a setting does not exist, one is missing, or one is out of range.
        """
        if self.function not in attacks.__all__ or not self.function.islower():
            known = [name for name in attacks.__all__ if name.islower()]
            raise ValueError(f"Expected `function` to be one of {known}, but got {self.function!r}.")
        function = getattr(attacks, self.function)
        bound = partial(function, **self.settings)
        try:
            inspect.signature(function).bind(None, None, None, **self.settings)
        except TypeError as error:
            wanted = list(inspect.signature(function).parameters)[3:]
            raise ValueError(
                f"Expected the settings of {self.function} to be {wanted}, but got {self.settings}: {error}."
            ) from error
        # One tiny attack makes the function itself judge its settings before any long work.
        bound(lambda images: images.flatten(1), torch.full((1, 2), 0.5), torch.zeros(1).long())
        return bound


@dataclass(frozen=True)
class Experiment:
    """One row of the paper's tables: a backbone, its surrogates, the attacks through each.

    Args:
        backbone: The attacked network.
        surrogates: DkNNB variants by name.
        victim: kNN and DkNN.
        attacks: By name.
        label_source: Which label the attacks ascend.
        seed: Of training.
        root: Folder of the data files, instead of the configurations'.
        output: Folder for rows, tables and pictures.
        cache: Folder for what later runs can use again.
        device: ``auto`` is the GPU if there is one.
    """

    backbone: Trained
    surrogates: dict[str, Trained]
    attacks: dict[str, AttackSettings]
    victim: VictimSettings = field(default_factory=VictimSettings)
    label_source: LabelSource = "knn"
    seed: int = 0
    root: str | None = None
    output: str = "runs/experiment"
    cache: str = "runs/cache"
    device: str = "auto"


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
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if experiment.device == "auto" else experiment.device)
        if ORIGIN in experiment.surrogates:
            raise ValueError(f"Expected no surrogate named {ORIGIN!r}: that is the backbone.")
        self._attacks = {name: attack.bind() for name, attack in experiment.attacks.items()}
        self._trainings = {
            name: self._instantiate(trained, kind)
            for name, trained, kind in (
                (ORIGIN, experiment.backbone, BackboneModule),
                *((name, s, SurrogateModule) for name, s in experiment.surrogates.items()),
            )
        }
        backbone = self._trainings[ORIGIN]
        layers = backbone.model.network.layers
        if experiment.victim.layer not in layers:
            raise ValueError(
                f"Expected `victim.layer` to be one of {list(layers)}, but got {experiment.victim.layer!r}."
            )
        self.data: ImageDataModule = backbone.datamodule
        self.data.prepare_data()
        rows = len(self.data.split("train"))
        for name, k in (
            ("victim.k", experiment.victim.k),
            *((f"{n}'s k", t.model.k) for n, t in self._trainings.items() if n != ORIGIN),
        ):
            if not 1 <= k < rows:
                raise ValueError(
                    f"Expected {name} to be in [1, {rows - 1}] (the bank's rows less the image's own), but got {k}."
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
            "trainings": {name: _settings(cli) for name, cli in self._trainings.items()},
            "checkpoints": {
                ORIGIN: experiment.backbone.checkpoint,
                **{name: s.checkpoint for name, s in experiment.surrogates.items()},
            },
            "victim": {k: v for k, v in asdict(experiment.victim).items() if k != "backend"},
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
            f"adversarial/{self._adversarial_key(method, attack)}/{start:06d}",
            f"attack {method}/{attack}",
            lambda: {"adversarial": self._attack(method, attack, start)},
        )
        return stored["adversarial"].to(self.device)

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
        found = self._stage(f"observations/{key}/{start:06d}", f"query {label}", query)
        settings = self.experiment.victim
        return decide(
            *(found[name].to(self.device) for name in ("dnn", "votes")),
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
                "backbone": self._backbone_digest,
                "layers": list(self.backbone.layers),
                "data": self.data.fingerprint,
                "k": settings.k,
                "metric": settings.metric,
                "version": __version__,
            }
        )

    def _attack(self, method: str, attack: str, start: int) -> Tensor:
        images, labels, _ = self._shard(start)
        if self.experiment.label_source == "knn":
            labels = self._verdicts(None, None, start).knn
        return perturb(self._attacks[attack], self.logits_fn(method), images, labels)

    def _adversarial_key(self, method: str, attack: str) -> str:
        settings = self.experiment.victim
        knn = [settings.layer, settings.k, settings.metric]
        return digest(
            {
                "backbone": self._backbone_digest,
                "attacked": weights_digest(self.logits_fn(method)),
                "attack": asdict(self.experiment.attacks[attack]),
                "labels": knn if self.experiment.label_source == "knn" else "true",
                "data": self.data.fingerprint,
                "version": __version__,
            }
        )

    @cached_property
    def _backbone_digest(self) -> str:
        return weights_digest(self.backbone)

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
        module = self._trainings[name].model
        module.backbone_checkpoint = self._checkpoint(ORIGIN)
        module.load_backbone(self.data.name)
        votes_key = digest([self._victim_key, module.layer, module.k, module.metric])
        module.votes_file = self.cache / "votes" / votes_key
        surrogate: Surrogate = self._train(name).surrogate
        return surrogate.to(self.device).eval()

    def _checkpoint(self, name: str) -> Path:
        """Where a module's checkpoint is or will be."""
        given = (self.experiment.backbone if name == ORIGIN else self.experiment.surrogates[name]).checkpoint
        if given:
            return Path(given)
        key = [_settings(self._trainings[name]), self.data.fingerprint, __version__]
        if name != ORIGIN:
            key.append(self._backbone_digest)
        kind = "backbone" if name == ORIGIN else "surrogate"
        return self.cache / kind / f"{digest(key)}.ckpt"

    def _train(self, name: str) -> Any:
        """The module with its trained weights: loaded, or trained from its configuration and kept."""
        cli, checkpoint = self._trainings[name], self._checkpoint(name)
        if not checkpoint.is_file():
            self._fit(cli, checkpoint)
        module = cli.model
        load_weights(module, checkpoint, module.identity(self.data.name))
        facts = checkpoint.with_suffix(".json")
        if facts.is_file():
            self._seconds[str(checkpoint)] = f"train {name}", json.loads(facts.read_text())["seconds"]
        return module

    def _fit(self, cli: AdvKNNCLI, checkpoint: Path) -> None:
        """Train as train.py does, going on from the last epoch of an interrupted run."""
        unfinished = checkpoint.with_suffix(".unfinished")
        best = next(c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint))
        best.dirpath = str(unfinished)
        cli.trainer.loggers = [CSVLogger(unfinished, name="", version="log")]
        # They measure and do not train; the experiment measures afterwards.
        cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, AttackEvaluation)]
        last = unfinished / "last.ckpt"
        started = time.perf_counter()
        seed_everything(self.experiment.seed, verbose=False)
        cli.trainer.fit(
            cli.model,
            datamodule=self.data,
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )
        if cli.trainer.interrupted:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        facts = {"training": _settings(cli), "seconds": seconds, **provenance(self.device)}
        write_json(checkpoint.with_suffix(".json"), facts)
        with atomic_path(checkpoint) as temporary:
            shutil.copyfile(best.best_model_path, temporary)
        shutil.rmtree(unfinished)

    def _instantiate(self, trained: Trained, kind: type[LightningModule]) -> AdvKNNCLI:
        """Model, data and trainer of a train.py configuration, as train.py makes them."""
        args = [f"--config={trained.config.absolute}", f"--seed_everything={self.experiment.seed}"]
        if self.experiment.root is not None:
            args.append(f"--data.init_args.root={self.experiment.root}")
        args += [f"--model.init_args.{name}={json.dumps(value)}" for name, value in trained.overrides.items()]
        args += [
            "--trainer.logger=false",
            f"--trainer.enable_progress_bar={json.dumps(sys.stderr.isatty())}",
            "--trainer.enable_model_summary=false",
            f"--trainer.accelerator={self.device.type}",
        ]
        with warnings.catch_warnings():
            # It warns that `args` hide the command line; here that is the point.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            cli = AdvKNNCLI(args, run=False)
        if not isinstance(cli.model, kind):
            raise ValueError(
                f"Expected {trained.config} to train a {kind.__name__}, but it trains a {type(cli.model).__name__}."
            )
        if not any(isinstance(c, ModelCheckpoint) and c.monitor for c in cli.trainer.callbacks):
            raise ValueError(
                f"Expected {trained.config} to have a ModelCheckpoint with a `monitor` among `trainer.callbacks`:"
                " it picks the epoch."
            )
        if trained.checkpoint and not Path(trained.checkpoint).is_file():
            raise FileNotFoundError(
                f"Expected a checkpoint at {trained.checkpoint}, but there is none. Leave `checkpoint` out to train one."
            )
        return cli


def _settings(cli: AdvKNNCLI) -> dict[str, Any]:
    """What of a train.py configuration decides the outcome, as plain values."""
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    defaults = cli.parser.get_defaults().trainer
    settings = {
        "seed_everything": config["seed_everything"],
        # A newer Lightning may know more arguments; only those that are set count.
        "trainer": {name: value for name, value in config["trainer"].items() if value != defaults.get(name)},
        "model": config["model"],
        "data": config["data"],
    }
    for part, places in _PLACES.items():
        arguments = settings[part].get("init_args", settings[part])
        for place in places & set(arguments):
            del arguments[place]
    settings["trainer"]["callbacks"] = [
        callback
        for callback in settings["trainer"].get("callbacks") or []
        if not callback["class_path"].endswith("AttackEvaluation")
    ]
    return settings


def provenance(device: torch.device) -> dict[str, Any]:
    """What a result file says of its making: versions, device and date."""
    packages = ("torch", "torchvision", "pytorch-lightning", "torchmetrics")
    return {
        "versions": {
            "lightning-advknn": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "date": datetime.date.today().isoformat(),
    }
