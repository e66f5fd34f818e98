"""Attacks during training: what `attack.py` measures, each epoch on a few images."""

import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.callbacks import wandb_panels
from lightning_advknn.callbacks.subsets import batches, draw_subsets, read
from lightning_advknn.classifiers import DkNNClassifier, build_banks
from lightning_advknn.data import data_of
from lightning_advknn.evaluation import (
    LabelSource,
    Rows,
    Verdicts,
    Victim,
    judge,
    make_rows,
    perturb,
    summarize,
)
from lightning_advknn.functional import Convention
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.search import Metric

_SEED = 0  # of attacks that draw random numbers


class AttackEvaluation(Callback):
    """Attacks kNN and DkNN through the module in training, as `attack.py` does, on the same few images each time.

    Logs ``attack/<name>/<metric>`` for each metric of `evaluation.AttackMetrics`, and accuracies and credibilities before the
    attack as ``attack/clean/<metric>``; W&B loggers get `wandb_panels` too. A `BackboneModule` is attacked itself,
    the victims of a `SurrogateModule` are attacked through its surrogate. While fitting and validating, attacked
    and calibration images are disjoint parts of the validation split; only testing reads the test split. Training goes on
    exactly as it would without this callback.

    Args:
        attacks: By name.
        layer: Layer of the kNN.
        layers: Layers that DkNN votes with; None for the module's own.
        k: Neighbours that vote.
        metric: Their distance.
        convention: How credibility counts ties.
        label_source: Which label the attacks ascend.
        num_images: Images attacked.
        num_calibration: Images that calibrate credibility.
        bank_size: Training images in the bank; None for all.
        every_n_epochs: Epochs of a fit from one evaluation to the next.
        panel_images: Samples that W&B shows as images.

    Raises:
        ValueError: If an argument is out of range or an attack or one of its settings does not exist.
    """

    def __init__(
        self,
        attacks: dict[str, AttackSettings],
        layer: str = "relu3",
        layers: Sequence[str] | None = None,
        k: int = 75,
        metric: Metric = "cosine",
        convention: Convention = "strict",
        label_source: LabelSource = "knn",
        num_images: int = 64,
        num_calibration: int = 250,
        bank_size: int | None = 3000,
        every_n_epochs: int = 1,
        panel_images: int = 8,
    ) -> None:
        for name, value, least in (
            ("k", k, 1),
            ("num_images", num_images, 1),
            ("num_calibration", num_calibration, 1),
            ("bank_size", 1 if bank_size is None else bank_size, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("panel_images", panel_images, 0),
        ):
            if value < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
        for name, choice, known in (
            ("metric", metric, get_args(Metric)),
            ("convention", convention, get_args(Convention)),
            ("label_source", label_source, get_args(LabelSource)),
        ):
            if choice not in known:
                raise ValueError(f"Expected `{name}` to be one of {known}, but got {choice!r}.")
        if "clean" in attacks:
            raise ValueError("Expected no attack named 'clean': that is before the attack. Rename it.")
        self.attacks = {name: (attack.bind(), attack.precision) for name, attack in attacks.items()}
        self.layer, self.layers = layer, layers
        self.k, self.metric, self.convention = k, metric, convention
        self.label_source = label_source
        self.num_images, self.num_calibration, self.bank_size = num_images, num_calibration, bank_size
        self.every_n_epochs = every_n_epochs
        self.panel_images = panel_images
        self._known: tuple[Victim, Verdicts] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bind to the module and the data, and check all that can be checked before anything long starts.

        Raises:
            ValueError: If a layer does not exist, a split has too few images, or k exceeds the bank.
            TypeError: If module or data are of another kind.
        """
        if stage == "predict":
            return
        data = data_of(trainer)
        own = _feature_network(pl_module)
        # The same submodules under a list of layers of their own.
        self._network = FeatureNetwork(own.network, self.layers or own.layers)
        if self.layer not in self._network.layers:
            raise ValueError(
                f"Expected `layer` to be one of `layers`, {list(self._network.layers)}, but got {self.layer!r}."
            )
        self._subsets = draw_subsets(
            data, stage == "test", self.num_images, self.num_calibration, self.bank_size
        )
        rows = len(self._subsets.bank)
        if self.k > rows:
            raise ValueError(f"Expected `k` to be in [1, {rows}] (the bank's rows), but got {self.k}.")
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"Expected `num_images` to be at least {trainer.world_size}, one a process, but got {self.num_images}."
            )
        self._num_classes, self._batch_size = data.num_classes, data.eval_batch_size
        self._known = None
        # Lightning cannot know that these values have been reduced over ranks already.
        warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('attack/")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the bank."""
        self._known = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack validation images."""
        fitting = trainer.state.fn == "fit"
        if trainer.sanity_checking or (fitting and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack test images."""
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        trainable = any(parameter.requires_grad for parameter in self._network.parameters())
        surrogate = module if isinstance(module, SurrogateModule) else None
        # As `attack.py` finds it: Lightning validates without gradients, and outside of a fit in inference mode.
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
            positions = torch.arange(trainer.global_rank, self.num_images, trainer.world_size)
            images, labels, ids = read(self._subsets.attacked, positions, module.device)
            victim, before = self._known or self._judge_clean(images)
            self._known = None if trainable else (victim, before)
            rows = make_rows(ids, labels, images, images, before, before, surrogate)
            _log(trainer, module, "clean", rows)
            for name, (attack, precision) in self.attacks.items():
                torch.manual_seed(_SEED)
                ascended = before.knn if self.label_source == "knn" else labels
                adversarial = perturb(attack, module, images, ascended, precision)
                after = judge(victim, adversarial)
                rows = make_rows(ids, labels, images, adversarial, before, after, surrogate)
                _log(trainer, module, name, rows)
                samples = {**rows, "images": images, "adversarial": adversarial}
                wandb_panels.show_samples(trainer, name, samples, self._network.layers, self.panel_images)

    def _judge_clean(self, images: Tensor) -> tuple[Victim, Verdicts]:
        """The victims, which a trained backbone changes, and what they say of the clean images."""
        network, device = self._network, images.device
        bank, calibration = (
            batches(split, self._batch_size, device)
            for split in (self._subsets.bank, self._subsets.calibration)
        )
        banks = build_banks(network, bank, self._num_classes, self.metric)
        dknn = DkNNClassifier(network, banks, self.k, self.convention).to(device)
        dknn.calibrate(calibration)
        victim = Victim(dknn, self.layer)
        return victim, judge(victim, images)


def _feature_network(module: LightningModule) -> FeatureNetwork:
    if isinstance(module, BackboneModule):
        return module.network
    if isinstance(module, SurrogateModule):
        return module.surrogate.backbone
    raise TypeError(
        f"Expected a BackboneModule or a SurrogateModule as `model`, but got a {type(module).__name__}."
    )


def _log(trainer: Trainer, module: LightningModule, name: str, rows: Rows) -> None:
    metrics = summarize(rows)  # over all ranks
    if name == "clean":  # there is no distortion, and its errors are no attack's success
        metrics = {key: value for key, value in metrics.items() if key.endswith(("_acc", "_credibility"))}
    named = {f"attack/{name}/{key}": value for key, value in metrics.items()}
    wandb_panels.use_epoch_axis(trainer, named)
    module.log_dict(named)
