"""A small network, and the callback and trainer for it."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import nn

from lightning_advknn.attacks import Attack, AttackSettings
from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.data import Batch
from lightning_advknn.data.sample import fair_order
from lightning_advknn.data.splits import ImageSplit
from lightning_advknn.modules import SurrogateModule

FGSM = AttackSettings("fgsm", {"eps": 0.1})


SIZES = {"k": 5, "num_images": 61, "num_calibration": 40, "bank_size": 200}


LAYERS = ["norm", "relu"]


class SmallNet(nn.Sequential):
    """A convolution with batch norm and dropout, for 1x28x28 images."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(1, 4, kernel_size=8, stride=4),
                norm=nn.BatchNorm2d(4),
                relu=nn.ReLU(),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(0.2),
                logits=nn.Linear(144, 10),
            )
        )


class Noise(AttackSettings):
    """An attack that uses the global random generator."""

    def check(self) -> None: ...

    def bind(self, image_shape: tuple[int, ...] = (), num_classes: int = 0) -> Attack:
        return lambda _, images, labels: (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def make_callback(**arguments: Any) -> AttackEvaluation:
    return AttackEvaluation(
        **{"attacks": {"fgsm": FGSM}, "layer": "relu", "layers": LAYERS, **SIZES, **arguments}
    )


def make_surrogate(checkpoint: Path) -> SurrogateModule:
    return SurrogateModule(SmallNet(), str(checkpoint), "relu", k=5, learning_rate=0.01)


def chosen(split: ImageSplit, first: int, last: int) -> Batch:
    """Images of the split's fair order from `first` to `last`, by id."""
    order = fair_order(split.labels, 0)
    return split.__getitems__(order[first:last].sort().values.tolist())


def attack_metrics(trainer: Trainer) -> dict[str, float]:
    return {
        name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("attack/")
    }
