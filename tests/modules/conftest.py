"""Fixtures: a network with batch norm, a quiet trainer, a trained backbone."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule

CPU = torch.device("cpu")


class SmallNet(nn.Sequential):
    """A convolution with batch norm, dropout and a linear layer, for 1x28x28 images."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(1, 4, kernel_size=8, stride=4),
                norm=nn.BatchNorm2d(4),
                relu=nn.ReLU(),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                logits=nn.Linear(144, num_classes),
            )
        )


@pytest.fixture(scope="session")
def small_net() -> type[SmallNet]:
    """The class, whose layers are ``conv``, ``norm``, ``relu`` and ``logits``."""
    return SmallNet


@pytest.fixture(scope="session")
def make_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Make a trainer of one epoch, on the CPU, that writes nothing, by default."""

    def make(device: torch.device = CPU, **options: Any) -> Trainer:
        quiet = {
            "accelerator": device.type,
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path_factory.mktemp("trainer"),
        }
        return Trainer(**{**quiet, **options})

    return make


@pytest.fixture(scope="session")
def make_backbone(
    tmp_path_factory: pytest.TempPathFactory, make_trainer: Callable[..., Trainer]
) -> Callable[[int], Path]:
    """Train a `SmallNet` on 150 digits for two epochs; its checkpoint."""

    def make(seed: int) -> Path:
        torch.manual_seed(seed)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(BackboneModule(SmallNet(), ["relu"], learning_rate=0.01), datamodule=Digits(val_size=850))
        path = tmp_path_factory.mktemp("backbone") / "backbone.ckpt"
        trainer.save_checkpoint(path)
        return path

    return make


@pytest.fixture(scope="session")
def backbone_checkpoint(make_backbone: Callable[[int], Path]) -> Path:
    """Checkpoint of a `SmallNet` trained on digits."""
    return make_backbone(0)


@pytest.fixture
def backbone(small_net: type[nn.Module]) -> BackboneModule:
    return BackboneModule(small_net(), ["relu"])
