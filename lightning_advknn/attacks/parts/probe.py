"""The trial of an attack on a tiny classifier, so that errors show before any long work."""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.choices import GradientPrecision

_CALLS, _SECONDS = 500, 2.0  # limits of a trial; an attack that reaches them passes


class _EnoughError(BaseException):
    """Ends a long trial. It is not an `Exception`, so that the attack does not handle it."""


class Probe(nn.Module):
    """A linear classifier in which each bright pixel adds to one class, and each dark pixel subtracts.

    Args:
        image_shape: ``(channels, H, W)``.
        num_classes: C.
        differentiable: Whether its logits have a gradient; a victim's votes have none.
    """

    def __init__(self, image_shape: tuple[int, ...], num_classes: int, differentiable: bool = True) -> None:
        super().__init__()
        self.image_shape, self.num_classes, self.differentiable = image_shape, num_classes, differentiable
        self.calls, self.until = 0, time.monotonic() + _SECONDS
        generator = torch.Generator().manual_seed(0)
        signs = 2 * torch.randint(2, (prod(image_shape),), generator=generator) - 1
        self.weight = nn.Parameter(signs.to(torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        self.calls += 1
        if self.calls > _CALLS or time.monotonic() > self.until:
            raise _EnoughError
        votes = F.pad((images.flatten(1) - 0.5) * self.weight, (0, -self.weight.numel() % self.num_classes))
        logits = 10 * votes.view(len(images), -1, self.num_classes).mean(1)
        return logits if self.differentiable else logits.detach()

    def examples(self) -> tuple[Tensor, Tensor]:
        """Two images ``(2, channels, H, W)`` that it classifies with high confidence, and their classes."""
        labels = torch.arange(2) % self.num_classes
        own = torch.arange(self.weight.numel()) % self.num_classes == labels[:, None]
        images = 0.5 + 0.4 * self.weight.detach() * (2.0 * own - 1)
        return images.view(2, *self.image_shape).float(), labels


def try_out(
    attack: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor],
    image_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 10,
    precision: GradientPrecision = "float32",
    differentiable: bool = True,
) -> tuple[object, Tensor] | None:
    """Run an attack on two images of a `Probe`, for a limited time; its errors are raised.

    Args:
        attack: Attack on a logits function, with its settings bound.
        image_shape: ``(channels, H, W)``.
        num_classes: C.
        precision: How gradients are computed.
        differentiable: Whether the logits have a gradient.

    Returns:
        Its result, and the images ``(2, channels, H, W)``; None if the time is over.
    """
    with torch.inference_mode(False), torch.enable_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they appear again in the real run
        probe = Probe(image_shape, num_classes, differentiable)
        images, labels = probe.examples()
        try:
            # The others differ in convolutions, of which the probe has none, and on devices that it is not on.
            with prepared(probe, "bfloat16" if precision == "bfloat16" else "float32") as logits_fn:
                return attack(logits_fn, images.clone(), labels), images
        except _EnoughError:
            return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all global random generators, and restore them afterwards."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - ART draws from it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002
