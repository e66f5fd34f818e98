"""A trained network, and modules with its weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, seed_everything

from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule
from tests.callbacks.small import LAYERS, SmallNet, make_surrogate, make_trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a `SmallNet` trained on digits."""
    seed_everything(0, verbose=False)
    folder = tmp_path_factory.mktemp("backbone")
    trainer = make_trainer(folder, max_epochs=2, limit_train_batches=1.0)
    trainer.fit(BackboneModule(SmallNet(), LAYERS, learning_rate=0.01), datamodule=Digits())
    trainer.save_checkpoint(folder / "backbone.ckpt")
    return folder / "backbone.ckpt"


@pytest.fixture(params=["backbone", "surrogate"])
def make_module(request: pytest.FixtureRequest, checkpoint: Path) -> Callable[[], LightningModule]:
    """Make either module with the trained backbone's weights."""

    def make() -> LightningModule:
        seed_everything(1, verbose=False)
        if request.param == "surrogate":
            return make_surrogate(checkpoint)
        module = BackboneModule(SmallNet(), LAYERS, learning_rate=0.01)
        module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        return module

    return make
