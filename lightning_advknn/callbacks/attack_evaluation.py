"""Attacks during training: what `attack.py` measures, each epoch on a few images."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_advknn.attacks import Attack, AttackSettings
from lightning_advknn.callbacks import wandb_panels
from lightning_advknn.callbacks.attacked_images import Scene, measuring
from lightning_advknn.callbacks.subsets import batches, draw_subsets, read
from lightning_advknn.choices import Convention, LabelSource, Metric
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import data_of
from lightning_advknn.evaluation import Verdicts, judge
from lightning_advknn.functional import whole
from lightning_advknn.models import FeatureNetwork, kept_modes
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checkpoint import check_precision
from lightning_advknn.search.build import BankSettings, build_banks


class AttackEvaluation(Callback):
    """Attacks kNN and DkNN through the module in training, as `attack.py` does, on the same few images each time.

    Logs ``attack/<name>/<metric>`` for each metric of `evaluation.AttackMetrics`, and accuracies and credibilities before the
    attack as ``attack/clean/<metric>``; accuracies of the kNN on each layer, ``layers/<name>/<layer>_knn_acc``; and how well a
    surrogate imitates the kNN on its layer, if that is one of `layers`, ``surrogate/<name>/agreement`` and ``kl``. At the end of a fit, and when validating or testing, it also
    logs ``eps/<name>/<victim>_success`` (1 - accuracy) over ``eps/eps``. W&B loggers get `wandb_panels` too.

    A `BackboneModule` is attacked itself, the victims of a `SurrogateModule` are attacked through its surrogate. While fitting
    and validating, attacked and calibration images are disjoint parts of the validation split; only testing reads the test
    split. Training goes on exactly as it would without this callback.

    Args:
        attacks: By name.
        layer: Layer of the kNN; None for the surrogate's own.
        layers: Layers that DkNN votes with; None for the module's own.
        k: Neighbours that vote; None for the surrogate's own.
        metric: Their distance.
        convention: How credibility counts ties.
        label_source: Which label the attacks ascend.
        num_images: Images attacked.
        num_calibration: Images that calibrate credibility.
        bank_size: Training images in the bank; None for all.
        every_n_epochs: Epochs of a fit from one evaluation to the next.
        panel_images: Samples that W&B shows as images.
        eps: Eps of all attacks that have one, instead of their own.
        eps_curve: Eps at which success is measured beside no attack and the attacks' own; none for no curve.

    Raises:
        ValueError: If an argument is out of range or no whole number, or an attack or one of its settings
            does not exist.
    """

    def __init__(
        self,
        attacks: dict[str, AttackSettings],
        layer: str | None = "relu3",
        layers: Sequence[str] | None = None,
        k: int | None = 75,
        metric: Metric = "cosine",
        convention: Convention = "strict",
        label_source: LabelSource = "knn",
        num_images: int = 64,
        num_calibration: int = 250,
        bank_size: int | None = 3000,
        every_n_epochs: int = 1,
        panel_images: int = 8,
        eps: float | None = None,
        eps_curve: Sequence[float] = (),
    ) -> None:
        for name, value, least in (
            ("k", 1 if k is None else k, 1),
            ("num_images", num_images, 1),
            ("num_calibration", num_calibration, 1),
            ("bank_size", 1 if bank_size is None else bank_size, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("panel_images", panel_images, 0),
        ):
            if whole(name, value) < least:
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
        eps_curve = [float(each) for each in eps_curve]  # as of NumPy's `linspace`
        if eps is not None:
            attacks = {name: _at(attack, float(eps)) for name, attack in attacks.items()}
        for attack in attacks.values():
            attack.check()
        self.attacks = attacks
        self.layer, self.layers = layer, layers
        self.k, self.metric, self.convention = k, metric, convention
        self.label_source = label_source
        self.num_images, self.num_calibration, self.bank_size = num_images, num_calibration, bank_size
        self.every_n_epochs = every_n_epochs
        self.panel_images = panel_images
        self.curves = _curves(attacks, eps_curve)
        self._bound: dict[str, Attack] = {}
        self._bound_at: dict[str, dict[float, Attack]] = {}
        self._known: tuple[DkNN, Verdicts] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bind to the module and the data, and check all that can be checked before anything long starts.

        Raises:
            ValueError: If the trainer's precision is another than victims decide in, a layer does not exist,
                a split has too few images, k exceeds the bank, or an attack fails on images like these.
            TypeError: If module or data are of another kind.
        """
        if stage == "predict":
            return
        check_precision(trainer)
        data = data_of(trainer)
        own = _feature_network(pl_module)
        # The same submodules under a list of layers of their own.
        with kept_modes(own.network):
            self._network = FeatureNetwork(own.network, self.layers or own.layers)
        self._layer, self._k = self._victim_of(pl_module)
        if self._layer not in self._network.layers:
            raise ValueError(
                f"Expected `layer` to be one of `layers`, {list(self._network.layers)}, but got {self._layer!r}."
            )
        self._subsets = draw_subsets(
            data, stage == "test", self.num_images, self.num_calibration, self.bank_size
        )
        rows = len(self._subsets.bank)
        if self._k > rows:
            raise ValueError(f"Expected `k` to be in [1, {rows}] (the bank's rows), but got {self._k}.")
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"Expected `num_images` to be at least {trainer.world_size}, one a process, but got {self.num_images}."
            )
        shape, classes = data.image_shape, data.num_classes
        self._bound = {name: attack.bind(shape, classes) for name, attack in self.attacks.items()}
        self._bound_at = {
            name: {eps: attack.bind(shape, classes) for eps, attack in attacks.items()}
            for name, attacks in self.curves.items()
        }
        self._num_classes, self._batch_size = data.num_classes, data.eval_batch_size
        self._known = None
        # Lightning cannot know that these values have been reduced over ranks already.
        warnings.filterwarnings(
            "ignore", message=r"It is recommended to use `self\.log\('(attack|layers|surrogate)/"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the bank."""
        self._known = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack validation images."""
        fitting = trainer.state.fn == "fit"
        if trainer.sanity_checking or (fitting and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        self._evaluate(trainer, pl_module)
        if not fitting:
            self._measure_curves(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack test images."""
        self._evaluate(trainer, pl_module)
        self._measure_curves(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have W&B draw the module's own metrics over epochs too."""
        own = [name for name in trainer.callback_metrics if name.startswith("val/")]
        wandb_panels.use_axis(trainer, own)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure success against eps, once: it takes as many attacks as there are eps."""
        self._measure_curves(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        with measuring(module):
            scene = self._scene(trainer, module)
            _log(trainer, module, scene.metrics("clean", scene.rows()))
            for name, attack in self._bound.items():
                adversarial = scene.attack(name, module, attack, self.attacks[name].precision)
                rows = scene.rows(adversarial)
                _log(trainer, module, scene.metrics(name, rows))
                samples = {**rows, "images": scene.images, "adversarial": adversarial}
                wandb_panels.show_samples(trainer, name, samples, self._network.layers, self.panel_images)

    def _measure_curves(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.curves:
            return
        with measuring(module):
            scene = self._scene(trainer, module)
            for eps in (0.0, *next(iter(self._bound_at.values()))):
                point = {"eps/eps": eps}
                for name, attacks in self._bound_at.items():
                    precision = self.attacks[name].precision
                    adversarial = scene.attack(name, module, attacks[eps], precision) if eps else None
                    point |= scene.success(name, scene.rows(adversarial))
                wandb_panels.use_axis(trainer, point, "eps/eps")
                for logger in trainer.loggers:
                    logger.log_metrics(point, trainer.global_step)

    def _victim_of(self, module: LightningModule) -> tuple[str, int]:
        """Layer and k of the kNN."""
        if isinstance(module, SurrogateModule):
            return self.layer or module.layer, self.k or module.k
        if self.layer is None or self.k is None:
            raise ValueError(
                f"Expected `layer` and `k` with a backbone, which has none of its own, but got {self.layer!r} and {self.k}."
            )
        return self.layer, self.k

    def _scene(self, trainer: Trainer, module: LightningModule) -> Scene:
        positions = torch.arange(trainer.global_rank, self.num_images, trainer.world_size)
        images, labels, ids = read(self._subsets.attacked, positions, module.device)
        dknn, before = self._known or self._judge_clean(images)
        trainable = any(parameter.requires_grad for parameter in self._network.parameters())
        self._known = None if trainable else (dknn, before)
        surrogate = module if isinstance(module, SurrogateModule) else None
        return Scene(images, labels, ids, dknn, self._layer, before, surrogate, self.label_source)

    def _judge_clean(self, images: Tensor) -> tuple[DkNN, Verdicts]:
        """The victim, which a trained backbone changes, and what it says of the clean images."""
        network, device = self._network, images.device
        bank, calibration = (
            batches(split, self._batch_size, device)
            for split in (self._subsets.bank, self._subsets.calibration)
        )
        banks = build_banks(network, bank, self._num_classes, BankSettings(self.metric))
        dknn = DkNN.on_banks(network, banks, self._k, self.convention).to(device)
        dknn.calibrate(calibration)
        return dknn, judge(dknn, self._layer, images)


def _log(trainer: Trainer, module: LightningModule, metrics: dict[str, float]) -> None:
    wandb_panels.use_axis(trainer, metrics)
    module.log_dict(metrics)


def _at(attack: AttackSettings, eps: float) -> AttackSettings:
    """The attack with another eps, if it has one."""
    return replace(attack, settings={**attack.settings, "eps": eps}) if "eps" in attack.settings else attack


def _curves(
    attacks: Mapping[str, AttackSettings], eps_curve: Sequence[float]
) -> dict[str, dict[float, AttackSettings]]:
    """Each attack that has an eps, at each eps of a curve and of any of them, in ascending order."""
    with_eps = {name: attack for name, attack in attacks.items() if "eps" in attack.settings}
    if not eps_curve:
        return {}
    if not with_eps:
        raise ValueError(
            f"Expected no `eps_curve` without an attack that has an eps, but got {list(eps_curve)}."
        )
    values = sorted({*eps_curve, *(attack.settings["eps"] for attack in with_eps.values())} - {0})
    curves = {name: {eps: _at(attack, eps) for eps in values} for name, attack in with_eps.items()}
    for curve in curves.values():
        for attack in curve.values():
            attack.check()
    return curves


def _feature_network(module: LightningModule) -> FeatureNetwork:
    if isinstance(module, BackboneModule):
        return module.network
    if isinstance(module, SurrogateModule):
        return module.surrogate.backbone
    raise TypeError(
        f"Expected a BackboneModule or a SurrogateModule as `model`, but got a {type(module).__name__}."
    )
