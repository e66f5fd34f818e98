"""Attacks during training: the metrics of `attack.py`, each epoch on a few images."""

import warnings
from collections.abc import Sequence

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_advknn.attacks import Attack, AttackSettings
from lightning_advknn.callbacks import wandb_panels
from lightning_advknn.callbacks.attacked_images import AttackedImages, measuring
from lightning_advknn.callbacks.eps_curves import at_eps, eps_curves
from lightning_advknn.callbacks.subsets import batches, draw_subsets, read
from lightning_advknn.choices import Convention, LabelSource, Metric, at_least, check_choice
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import data_of
from lightning_advknn.evaluation import Verdicts, judge
from lightning_advknn.models import FeatureNetwork, kept_modes
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checks import check_precision
from lightning_advknn.search.build import BankSettings, build_banks


class AttackEvaluation(Callback):
    """Attack kNN and DkNN during training as `attack.py` does, on the same few images each time.

    Attacks go through a `BackboneModule` itself, and through the surrogate of a `SurrogateModule`. Training
    is not affected. During fit and validation, attacked and calibration images are disjoint parts of the
    validation split; only testing uses the test split.

    Logs:

    - ``attack/<name>/<metric>`` for each metric of `evaluation.summarize`, and ``attack/clean/<metric>``
      for accuracies and credibilities before the attack
    - ``layers/<name>/<layer>_knn_acc``, the accuracy of the kNN on each layer
    - ``surrogate/<name>/agreement`` and ``kl``, how well a surrogate imitates the kNN on its layer, if that
      is one of `layers`
    - ``eps/<name>/<victim>_success`` (1 - accuracy) over ``eps/eps``, at the end of fit, validation or test
    - panels of `wandb_panels` for W&B loggers

    Args:
        attacks: Attacks by name.
        layer: Layer of the kNN; None for the surrogate's layer.
        layers: Layers that DkNN votes with; None for the module's layers.
        k: Number of neighbours that vote; None for the surrogate's k.
        metric: Distance of the neighbours.
        convention: How credibility counts ties.
        label_source: Which label the attacks ascend.
        num_images: Number of images to attack.
        num_calibration: Number of images to calibrate credibility.
        bank_size: Number of training images in the bank; None for all.
        every_n_epochs: Number of epochs between evaluations during fit.
        panel_images: Number of samples that W&B shows as images.
        eps: Replaces the eps of all attacks that have one.
        eps_curve: Eps of the success curve, in addition to 0 and the attacks' own; empty for no curve.

    Raises:
        ValueError: If an argument is out of range or not an integer, or if an attack or one of its settings
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
        check_choice("metric", metric, Metric)
        check_choice("convention", convention, Convention)
        check_choice("label_source", label_source, LabelSource)
        if "clean" in attacks:
            raise ValueError("Expected no attack named 'clean', the name of unattacked images. Rename it.")
        if eps is not None:
            attacks = {name: at_eps(attack, float(eps)) for name, attack in attacks.items()}
        for attack in attacks.values():
            attack.check()
        self.attacks = attacks
        self.layer, self.layers = layer, layers
        self.k = None if k is None else at_least("k", k, 1)
        self.metric, self.convention, self.label_source = metric, convention, label_source
        self.num_images = at_least("num_images", num_images, 1)
        self.num_calibration = at_least("num_calibration", num_calibration, 1)
        self.bank_size = None if bank_size is None else at_least("bank_size", bank_size, 1)
        self.every_n_epochs = at_least("every_n_epochs", every_n_epochs, 1)
        self.panel_images = at_least("panel_images", panel_images, 0)
        self.curves = eps_curves(attacks, [float(each) for each in eps_curve])  # Python's, not NumPy's
        self._bound: dict[str, Attack] = {}
        self._bound_at: dict[str, dict[float, Attack]] = {}
        self._judged: tuple[DkNN, Verdicts] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bind to the module and the data, and check everything before long work.

        Raises:
            ValueError: If the trainer's precision is not supported, a layer does not exist, a split has too
                few images, k exceeds the bank, or an attack refuses these images.
            TypeError: If the module or the data are not this package's.
        """
        if stage == "predict":
            return
        check_precision(trainer)
        data = data_of(trainer)
        own = _feature_network(pl_module)
        # The module's network, with other layers.
        with kept_modes(own.network):
            self._network = FeatureNetwork(own.network, self.layers or own.layers)
        self._layer, self._k = self._victim_of(pl_module)
        if self._layer not in self._network.layers:
            raise ValueError(
                f"Expected `layer` to be one of `layers`, {list(self._network.layers)}, but got"
                f" {self._layer!r}."
            )
        self._subsets = draw_subsets(
            data, stage == "test", self.num_images, self.num_calibration, self.bank_size
        )
        rows = len(self._subsets.bank)
        if self._k > rows:
            raise ValueError(f"Expected `k` to be in [1, {rows}] (the bank's rows), but got {self._k}.")
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"Expected `num_images` to be at least {trainer.world_size}, one for each process, but got"
                f" {self.num_images}."
            )
        shape, classes = data.image_shape, data.num_classes
        self._bound = {name: attack.bind(shape, classes) for name, attack in self.attacks.items()}
        self._bound_at = {
            name: {eps: attack.bind(shape, classes) for eps, attack in attacks.items()}
            for name, attacks in self.curves.items()
        }
        self._num_classes, self._batch_size = data.num_classes, data.eval_batch_size
        self._judged = None
        # These values are already reduced over ranks, which Lightning does not know.
        warnings.filterwarnings(
            "ignore", message=r"It is recommended to use `self\.log\('(attack|layers|surrogate)/"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the bank."""
        self._judged = None

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
        """Let W&B plot the module's own metrics over epochs too."""
        own = [name for name in trainer.callback_metrics if name.startswith("val/")]
        wandb_panels.use_axis(trainer, own)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure success against eps, only now, as each eps is one more attack."""
        self._measure_curves(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        with measuring(module):
            attacked = self._attacked_images(trainer, module)
            _log(trainer, module, attacked.metrics("clean", attacked.rows()))
            for name, attack in self._bound.items():
                adversarial = attacked.attack(name, module, attack, self.attacks[name].precision)
                rows = attacked.rows(adversarial)
                _log(trainer, module, attacked.metrics(name, rows))
                samples = {**rows, "images": attacked.images, "adversarial": adversarial}
                wandb_panels.show_samples(trainer, name, samples, self._network.layers, self.panel_images)

    def _measure_curves(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.curves:
            return
        with measuring(module):
            attacked = self._attacked_images(trainer, module)
            for eps in (0.0, *next(iter(self._bound_at.values()))):
                point = {"eps/eps": eps}
                for name, attacks in self._bound_at.items():
                    precision = self.attacks[name].precision
                    adversarial = attacked.attack(name, module, attacks[eps], precision) if eps else None
                    point |= attacked.success(name, attacked.rows(adversarial))
                wandb_panels.use_axis(trainer, point, "eps/eps")
                for logger in trainer.loggers:
                    logger.log_metrics(point, trainer.global_step)

    def _victim_of(self, module: LightningModule) -> tuple[str, int]:
        """The kNN's layer and k."""
        if isinstance(module, SurrogateModule):
            return self.layer or module.layer, self.k or module.k
        if self.layer is None or self.k is None:
            raise ValueError(
                f"Expected `layer` and `k` with a backbone, but got {self.layer!r} and {self.k}."
            )
        return self.layer, self.k

    def _attacked_images(self, trainer: Trainer, module: LightningModule) -> AttackedImages:
        positions = torch.arange(trainer.global_rank, self.num_images, trainer.world_size)
        images, labels, ids = read(self._subsets.attacked, positions, module.device)
        dknn, before = self._judged or self._judge_clean(images)
        trainable = any(parameter.requires_grad for parameter in self._network.parameters())
        self._judged = None if trainable else (dknn, before)
        surrogate = module if isinstance(module, SurrogateModule) else None
        return AttackedImages(images, labels, ids, dknn, self._layer, before, surrogate, self.label_source)

    def _judge_clean(self, images: Tensor) -> tuple[DkNN, Verdicts]:
        """Build the victims on the present network, and judge the clean images."""
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
    # As tensors on the CPU: Lightning copies numbers to the module's device, one by one.
    module.log_dict({name: torch.tensor(value) for name, value in metrics.items()})


def _feature_network(module: LightningModule) -> FeatureNetwork:
    if isinstance(module, BackboneModule):
        return module.network
    if isinstance(module, SurrogateModule):
        return module.surrogate.backbone
    raise TypeError(
        f"Expected a BackboneModule or a SurrogateModule as `model`, but got a {type(module).__name__}."
    )
