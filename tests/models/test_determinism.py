"""`check_function` passes deterministic networks, refuses others, and leaves every network unchanged."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_advknn.data import Batch
from lightning_advknn.models import ConvNet, FeatureNetwork, check_function
from lightning_advknn.modules import BackboneModule
from lightning_advknn.search.build import build_banks

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution, batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.middle(self.norm(self.conv(images))).flatten(1))

    def middle(self, maps: Tensor) -> Tensor:
        return maps


class NumpyNoise(Base):
    def middle(self, maps: Tensor) -> Tensor:
        return maps + float(np.random.standard_normal())  # noqa: NPY002


class OwnGenerator(Base):
    generator = torch.Generator().manual_seed(0)

    def middle(self, maps: Tensor) -> Tensor:
        return maps + 1e-6 * torch.rand(maps.shape, generator=self.generator)


class Seeded(Base):
    def middle(self, maps: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return F.dropout(maps)


class Centred(Base):
    def middle(self, maps: Tensor) -> Tensor:
        return maps - maps.mean(0)


class FirstOfBatch(Base):
    def middle(self, maps: Tensor) -> Tensor:
        return maps + 0.01 * maps[:1]


class NoSingle(Base):
    def middle(self, maps: Tensor) -> Tensor:
        return F.batch_norm(maps.mean((2, 3)), None, None, training=True)[:, :, None, None].expand_as(maps)


class AttendsOverBatch(Base):
    """An encoder that takes features ``(B, D)`` for one sequence instead of B images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(144, 2, 8, batch_first=True)

    def middle(self, maps: Tensor) -> Tensor:
        return self.encoder(maps.flatten(1))


class Everywhere(Base):
    """Normalisations that do not use batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.layer, self.group = (
            nn.InstanceNorm2d(4),
            nn.LayerNorm((4, 6, 6)),
            nn.GroupNorm(2, 4),
        )
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def middle(self, maps: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(self.group(self.layer(self.instance(maps))))


def features(network: nn.Module, layer: str = "conv") -> FeatureNetwork:
    return FeatureNetwork(network, [layer])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NumpyNoise, "draws random numbers .* asked twice the logits of image"),
        (OwnGenerator, "asked twice the logits .* a random generator of its own"),
        (Seeded, "do not depend on its batch, but alone and in a batch the logits of image"),
        (Centred, "alone and in a batch .*a mean over the whole batch"),
        (FirstOfBatch, "do not depend on its batch"),
        (AttendsOverBatch, "do not depend on its batch"),
        (NoSingle, "takes 4 and fails on one: Expected more than 1 value per channel"),
    ],
)
def test_others_are_refused(kind: type[Base], message: str) -> None:
    network = kind()
    with pytest.raises(ValueError, match=message):
        check_function(features(network), IMAGES)
    with pytest.raises(ValueError, match=message):
        build_banks(features(network), [Batch(IMAGES, torch.arange(4) % 3, torch.arange(4))], 3)


def test_features_count_as_logits_do() -> None:
    class Side(Base):
        def forward(self, images: Tensor) -> Tensor:
            self.norm(F.dropout(images.expand(-1, 4, -1, -1), 0.5 if self.noisy else 0.0))
            return self.fc(self.conv(images).flatten(1))

        noisy = False

    network = Side()
    check_function(features(network, "norm"), IMAGES)
    network.noisy = True
    with pytest.raises(ValueError, match="draws random numbers"):
        check_function(features(network, "norm"), IMAGES)


@pytest.mark.parametrize(
    "network",
    [
        Everywhere(),
        nn.Sequential(nn.Flatten(), nn.Identity()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 3))),
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, dropout=0.3, batch_first=True)),
    ],
)
def test_functions_pass_and_are_left_as_they_were(network: nn.Module) -> None:
    network.train()
    for part in list(network.modules())[1::2]:
        part.eval()  # modes of the caller's choice
    modes = [part.training for part in network.modules()]
    before = copy.deepcopy(network.state_dict())
    layer = next(name for name, _ in network.named_modules() if name)
    wrapped = features(network, layer)
    for part, mode in zip(network.modules(), modes, strict=True):
        part.training = mode
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for images in (IMAGES, IMAGES[:1]):
        check_function(wrapped, images)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


def test_known_networks_pass() -> None:
    check_function(FeatureNetwork(ConvNet(), ["relu1", "relu3", "logits"]), torch.rand(4, 1, 28, 28))
    resnet = torchvision.models.resnet18(num_classes=5)
    check_function(FeatureNetwork(resnet, ["layer1", "layer4", "avgpool"]), torch.rand(4, 3, 32, 32))


def test_what_it_changed_is_put_back() -> None:
    class Training(Base):
        def middle(self, maps: Tensor) -> Tensor:
            return F.batch_norm(maps, self.norm.running_mean, self.norm.running_var, training=True)

    network = Training()
    with pytest.raises(
        ValueError, match=r"in evaluation mode it changed `norm\.running_mean` by up to .*training=self"
    ):
        check_function(features(network), IMAGES)
    assert not network.norm.running_mean.any()
    assert network.norm.running_var.eq(1).all()


def test_a_layer_that_runs_twice_has_no_features() -> None:
    class Shared(Base):
        def middle(self, maps: Tensor) -> Tensor:
            return self.relu(self.relu(maps) - 0.5)

        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

    network = FeatureNetwork(Shared(), ["fc", "relu"])
    with pytest.raises(ValueError, match=r"these runs: \{'relu': 2\}.*run once are \['conv', 'norm', 'fc'\]"):
        network.features(IMAGES)
    assert not any(part._forward_hooks for part in network.modules())
    with pytest.raises(ValueError, match=r"these runs: \{'relu': 2\}"):
        BackboneModule(Shared(), ["relu"], (1, 8, 8), 3)
    assert set(FeatureNetwork(Shared(), ["fc", "conv"]).features(IMAGES)) == {"fc", "conv"}
