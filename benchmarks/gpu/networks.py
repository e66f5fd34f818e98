"""A trained network and images to attack: MNIST's where its files are, else classes of patterns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.sizes import Sizes
from lightning_advknn.data import MNIST
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import ConvNet

_BATCH = 128
_CLASSES = 10


class Attacked(NamedTuple):
    """What is attacked."""

    name: str
    """Of the images."""
    network: ConvNet
    images: Tensor
    """float32 ``(n, 1, 28, 28)`` in [0, 1]."""
    labels: Tensor
    """int64 ``(n,)``."""
    train_images: Tensor
    train_labels: Tensor


def attacked(device: torch.device, sizes: Sizes, root: str | None) -> Attacked:
    """Train a network for some steps on a device; which images come is always the same."""
    images, labels, test_images, test_labels = _mnist(sizes, root) if root else _patterns(sizes)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(0)
    network = ConvNet(mean=[0.1307], std=[0.3081]).to(device)
    optimizer = torch.optim.Adam(network.parameters())
    order = torch.randperm(sizes.training_steps * _BATCH, generator=torch.Generator().manual_seed(0))
    with float32_arithmetic():
        for batch in torch.split(order.to(device) % len(images), _BATCH):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    name = "MNIST" if root else "patterns"
    return Attacked(name, network.eval(), test_images.to(device), test_labels.to(device), images, labels)


def _mnist(sizes: Sizes, root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = MNIST(root=root, download=False)
    (images, labels), (test_images, test_labels) = data.load(train=True), data.load(train=False)
    n = sizes.images
    return images.float() / 255, labels, test_images[:n].float() / 255, test_labels[:n]


def _patterns(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_CLASSES, 1, 7, 7, generator=generator)
    patterns = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    found: list[Tensor] = []
    for n in (min(sizes.rows, 10 * sizes.images), sizes.images):
        labels = torch.arange(n) % _CLASSES
        noise = torch.rand(n, 1, 28, 28, generator=generator)
        found += [0.6 * patterns[labels] + 0.4 * noise, labels]
    return found[0], found[1], found[2], found[3]
