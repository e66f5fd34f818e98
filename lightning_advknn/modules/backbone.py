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
from lightning_advknn.modules.checkpoint import (
    IDENTITY,
    Identity,
    check_data,
    check_identity,
    check_loss,
    check_network,
    check_on_data,
    check_precision,
    describe,
)


class BackboneModule(LightningModule):
    """A classifier trained by cross-entropy with Adam, as the paper's DNN.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``.

    Args:
        network: Maps images in [0, 1] to logits; normalisation is part of it.
        layers: Names of its layers that victims and surrogates use.
        image_shape: Channels, height, width.
        num_classes: C.
        learning_rate: Of Adam.
        channels_last: Train with channels as the innermost dimension: the same network, computed faster on CPUs and on
            GPUs with matrix units.
        winograd: Multiply less in convolutions of small maps (`CookToomConvolution`): up to rounding the same training, in
            about 60 % of the time. On CPU only.

    Raises:
        ValueError: If a layer does not exist or the network does not map such images to as many classes.
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
        # Python's own numbers: a checkpoint that holds NumPy's does not load without running code.
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
        with kept_modes(network):  # which is to be trained in them
            self.network = FeatureNetwork(network, layers)
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self.channels_last, self.winograd = channels_last, winograd
        check_network(self.network, self.image_shape, num_classes)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images in [0, 1]."""
        logits: Tensor = self.network.network(images)  # not evaluated alone, but trained
        return logits

    def train(self, mode: bool = True) -> Self:
        """Switch the mode of the network itself; as a victim's, it always evaluates."""
        super().train(mode)
        self.network.network.train(mode)
        return self

    def identity(self, data_name: str) -> Identity:
        """What a checkpoint of this module says of itself."""
        return {
            "kind": "backbone",
            "network": describe(self.network.network),
            "data": data_name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }

    def setup(self, stage: str) -> None:
        """Check precision and data, and that the network is a function of the image."""
        check_precision(self.trainer)
        data = data_of(self.trainer)
        check_data(data, self.image_shape, self.num_classes)
        check_on_data(self.network, data)
        if stage == "fit" and self.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if stage == "fit" and self.winograd and self.trainer.strategy.root_device.type == "cpu":
            for conv in self._convolutions():
                # In its place, not instead of it: hooks and weights stay where others look for them.
                vars(conv)["forward"] = CookToomConvolution(conv, constant=False)

    def teardown(self, stage: str) -> None:
        """Leave the weights in torch's ordinary order, and convolutions as they were."""
        self.network.to(memory_format=torch.contiguous_format)
        for conv in self._convolutions():
            vars(conv).pop("forward", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it holds."""
        checkpoint[IDENTITY] = self.identity(data_of(self.trainer).name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else."""
        check_identity(checkpoint, self.identity(data_of(self.trainer).name), "the checkpoint")

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy on the true labels."""
        loss = F.cross_entropy(self(batch.images), batch.labels)
        check_loss(loss)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Loss and accuracy on the part of the training split that picks the epoch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch) -> None:
        """Loss and accuracy on the test images."""
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the authors' code."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)

    def _convolutions(self) -> list[nn.Conv2d]:
        return [module for module in self.network.modules() if type(module) is nn.Conv2d]

    @float32_arithmetic()  # as the victims on this network decide, also where training is mixed with shorter numbers
    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        logits = self(batch.images)
        accuracy(logits, batch.labels)
        loss = F.cross_entropy(logits, batch.labels)
        size = len(batch.labels)
        self.log(f"{stage}/loss", loss, batch_size=size, on_epoch=True, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=size, prog_bar=True)
