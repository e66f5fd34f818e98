"""Checks before and during training: precision, data, network and losses, which are logged."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_advknn.data import ImageDataModule
from lightning_advknn.functional import check_defaults
from lightning_advknn.models import ASKED, FeatureNetwork, check_function, device_of, kept_modes

_LOOK_EVERY = {"cpu": 1, "cuda": 50}  # training steps
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_precision(trainer: Trainer) -> None:
    """Raise a ValueError unless a trainer keeps weights in float32, as victims need; mixed precision does."""
    precision = trainer.precision
    if precision not in _PRECISIONS:
        raise ValueError(
            f"Expected the trainer's `precision` to be one of {list(_PRECISIONS)}, but got {precision!r}."
            " Victims need weights in float32; for speed, use 'bf16-mixed'."
        )


def check_data(data: ImageDataModule, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise a ValueError unless a data set has the image shape and classes of a module."""
    if tuple(data.image_shape) != image_shape or data.num_classes != num_classes:
        raise ValueError(
            f"Expected data with images of shape {image_shape} and {num_classes} classes, but {data.name} has"
            f" {tuple(data.image_shape)} and {data.num_classes}. Set `image_shape` and `num_classes` of the"
            " module and of the network to the data's."
        )


def check_network(network: FeatureNetwork, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise a ValueError unless a network maps images of this shape to logits and to features of each layer.

    Does not change the network.
    """
    check_defaults()  # the network's constructor may have changed them
    try:
        # In training mode, batch norm would update its statistics or refuse a single image.
        with kept_modes(network), torch.no_grad():
            logits, _ = network.eval().logits_and_features(torch.zeros(1, *image_shape))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a network for images of shape {image_shape}, but it fails on one: {error}. Set"
            " `image_shape` to the network's, or choose another network."
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"Expected the network to give logits of shape (B, {num_classes}), but got a"
            f" {type(logits).__name__}. Let its `forward` return the logits alone."
        )
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"Expected the network to give logits of shape (B, {num_classes}), but got {tuple(logits.shape)}."
            " Set `num_classes` of the module and of the network to the data's."
        )


def check_on_data(network: FeatureNetwork, data: ImageDataModule) -> None:
    """Apply `check_function` to a network with some training images."""
    split = data.split("train")
    positions = torch.linspace(0, len(split) - 1, min(ASKED, len(split))).long()
    images = split.__getitems__(positions.tolist()).images.to(device_of(network))
    weight = next(network.parameters(), images)
    check_function(network, images.to(weight.dtype) if weight.is_floating_point() else images)


class LossCheck:
    """Raises a ValueError unless training losses are finite: on a CPU at once, on a GPU for some steps together.

    To look at each would make the GPU wait in every step.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None  # which is not finite if one loss is not
        self._steps = 0

    def add(self, loss: torch.Tensor) -> None:
        """Take a step's loss, a scalar."""
        loss = loss.detach()
        self._sum = loss if self._sum is None else self._sum + loss
        self._steps += 1
        if self._steps == _LOOK_EVERY.get(loss.device.type, 1):
            self.look()

    def look(self) -> None:
        """Look at all losses since the last time; to be called before anything that they lead to is kept."""
        losses, self._sum, self._steps = self._sum, None, 0
        if losses is not None and not torch.isfinite(losses):
            raise ValueError(
                f"Expected a finite training loss, but got {losses.item()}. Lower the learning rate, and check"
                " the images and the initial weights for NaN or infinity."
            )


def log_loss(module: LightningModule, loss: torch.Tensor) -> None:
    """Log ``train/loss`` in the steps that Lightning shows to loggers, and in the last one of an epoch or of all.

    Lightning's `log` alone takes a third of a surrogate's step.
    """
    trainer: Any = module.trainer  # some attributes are set where type checkers do not see them
    step, every = module.global_step + 1, trainer.log_every_n_steps
    if trainer.is_last_batch or step == trainer.max_steps or (every and step % every == 0):
        module.log("train/loss", loss)
