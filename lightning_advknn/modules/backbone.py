"""Training of the backbone whose features the victims search."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_advknn.choices import whole
from lightning_advknn.convolutions import CookToomConvolution
from lightning_advknn.data import Batch, data_of
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import FeatureNetwork, kept_modes
from lightning_advknn.modules.checkpoint import IDENTITY, Identity, check_identity, describe
from lightning_advknn.modules.checks import (
    LossCheck,
    check_data,
    check_network,
    check_on_data,
    check_precision,
    log_loss,
)


class BackboneModule(LightningModule):
    """A classifier trained by cross-entropy with Adam: the paper's DNN.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``.

    Args:
        network: Maps images in [0, 1] to logits; normalisation is part of it.
        layers: Names of the layers that victims and surrogates use.
        image_shape: Channels, height, width.
        num_classes: C.
        learning_rate: Learning rate of Adam.
        channels_last: Train in the memory format channels_last, which is faster on CPUs and on GPUs with
            tensor cores.
        winograd: Train with fewer multiplications in convolutions of small maps (`CookToomConvolution`):
            equal up to rounding, in about 60 % of the time. CPU only.

    Raises:
        ValueError: If a layer does not exist, or the network does not map such images to logits of C classes.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] = ("relu1", "relu2", "relu3", "logits"),
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        learning_rate: float = 1e-3,
        channels_last: bool = False,
        winograd: bool = False,
    ) -> None:
        super().__init__()
        # As Python's own numbers: a checkpoint with NumPy's cannot be loaded without running code.
        image_shape = [whole("image_shape", size) for size in image_shape]
        num_classes, learning_rate = whole("num_classes", num_classes), float(learning_rate)
        self.save_hyperparameters(
            {
                "layers": list(layers),
                "image_shape": image_shape,
                "num_classes": num_classes,
                "learning_rate": learning_rate,
                "channels_last": channels_last,
                "winograd": winograd,
            }
        )
        with kept_modes(network):  # `FeatureNetwork` sets evaluation mode
            self.network = FeatureNetwork(network, layers)
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self._losses = LossCheck()
        self.channels_last, self.winograd = channels_last, winograd
        check_network(self.network, self.image_shape, num_classes)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images in [0, 1]."""
        logits: Tensor = self.network.network(images)  # the inner network can be in training mode
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the inner network; `FeatureNetwork` itself stays in evaluation mode."""
        super().train(mode)
        self.network.network.train(mode)
        return self

    def identity(self, data_name: str) -> Identity:
        """The identity that checkpoints of this module state."""
        return {
            "kind": "backbone",
            "network": describe(self.network.network),
            "data": data_name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }

    def setup(self, stage: str) -> None:
        """Check precision, data and network (`check_function`), and set up fast convolutions."""
        check_precision(self.trainer)
        data = data_of(self.trainer)
        check_data(data, self.image_shape, self.num_classes)
        check_on_data(self.network, data)
        self._losses = LossCheck()  # an earlier run may have been interrupted
        if stage == "fit" and self.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if stage == "fit" and self.winograd and self.trainer.strategy.root_device.type == "cpu":
            for conv in self._convolutions():
                # Only `forward` is replaced, so that hooks and weights stay in their module.
                vars(conv)["forward"] = CookToomConvolution(conv, constant=False)

    def teardown(self, stage: str) -> None:
        """Restore the memory format and the convolutions."""
        self.network.to(memory_format=torch.contiguous_format)
        for conv in self._convolutions():
            vars(conv).pop("forward", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """State the identity in the checkpoint; an unusable network is not saved."""
        self._losses.look()
        checkpoint[IDENTITY] = self.identity(data_of(self.trainer).name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another identity."""
        check_identity(checkpoint, self.identity(data_of(self.trainer).name), "the checkpoint")

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy with the true labels."""
        loss = F.cross_entropy(self(batch.images), batch.labels)
        self._losses.add(loss)
        log_loss(self, loss)
        return loss

    def on_validation_start(self) -> None:
        """Judge no network whose training has failed."""
        self._losses.look()

    def on_train_epoch_end(self) -> None:
        """End no epoch with one."""
        self._losses.look()

    def validation_step(self, batch: Batch) -> None:
        """Loss and accuracy on the validation images, which pick the epoch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch) -> None:
        """Loss and accuracy on the test images."""
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the authors' code."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)

    def _convolutions(self) -> list[nn.Conv2d]:
        return [module for module in self.network.modules() if type(module) is nn.Conv2d]

    @float32_arithmetic()  # as victims decide, also in mixed-precision training
    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        logits = self(batch.images)
        accuracy(logits, batch.labels)
        loss = F.cross_entropy(logits, batch.labels)
        size = len(batch.labels)
        self.log(f"{stage}/loss", loss, batch_size=size, on_epoch=True, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=size, prog_bar=True)
