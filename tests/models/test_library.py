"""Networks of other libraries compute what they do there, on normalised images."""

import re
import sys

import pytest
import torch
import torchvision
from torch import nn

from lightning_advknn.models import FeatureNetwork, LibraryNetwork

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
RESNET = "torchvision.models.resnet18"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_torchvision_network_normalises_and_pools(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = LibraryNetwork(RESNET, {"num_classes": 4}, MEAN, STD, {"model.layer1": 4}).eval()
    plain = torchvision.models.resnet18(num_classes=4).eval()
    plain.load_state_dict(network.model.state_dict())
    stem = nn.Sequential(plain.conv1, plain.bn1, nn.ReLU(), plain.maxpool, plain.layer1)
    with torch.no_grad():
        logits, features = FeatureNetwork(network, ["model.layer1", "model.layer2"]).logits_and_features(
            images
        )
        normalised = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
        assert torch.allclose(logits, plain(normalised), atol=1e-5)
        maps = stem(normalised)  # (2, 64, 8, 8)
        # Means of 2x2 blocks.
        blocks = maps.reshape(2, 64, 4, 2, 4, 2).mean((3, 5)).flatten(1)
        assert torch.allclose(features["model.layer1"], blocks, atol=1e-5)
        assert torch.allclose(features["model.layer2"], plain.layer2(maps).flatten(1), atol=1e-5)


def test_timm_network() -> None:
    timm = pytest.importorskip("timm")
    settings = {"model_name": "resnet10t", "pretrained": False, "num_classes": 4}
    network = LibraryNetwork("timm.create_model", settings, MEAN, STD).eval()
    plain = timm.create_model(**settings).eval()
    plain.load_state_dict(network.model.state_dict())
    images = torch.tensor(MEAN)[:, None, None].expand(1, 3, 32, 32)  # normalised to 0
    with torch.no_grad():
        logits, features = FeatureNetwork(network, ["model.layer4"]).logits_and_features(images)
        assert torch.allclose(logits, plain(torch.zeros(1, 3, 32, 32)), atol=1e-5)
    assert features["model.layer4"].shape == (1, 512)


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"timm\.create_model to be importable.*pip install -e \"\.\[timm\]\""
    ):
        LibraryNetwork("timm.create_model", {"model_name": "resnet18"})


@pytest.mark.parametrize(
    ("function", "settings", "pool", "error", "message"),
    [
        (
            "resnet18",
            {},
            {},
            ValueError,
            "import path such as torchvision.models.resnet18, but got 'resnet18'",
        ),
        ("no_such_module.make", {}, {}, ImportError, "Install no_such_module, or put it beside the script"),
        ("torchvision.models.resnet19", {}, {}, ValueError, "torchvision.models has none of that name"),
        (
            RESNET,
            {"classes": 3},
            {},
            ValueError,
            "settings {'classes': 3}, but it failed: TypeError.*keyword arguments",
        ),
        (
            RESNET,
            {"weights": "BEST"},
            {},
            ValueError,
            "{'weights': 'BEST'}, but it failed: KeyError",
        ),
        ("collections.OrderedDict", {}, {}, ValueError, "torch.nn.Module, but it made a OrderedDict"),
        ("torch.nn.Flatten", {}, {"layer1": 2}, ValueError, "but got 'layer1': 2. Its layers are"),
        ("torch.nn.Flatten", {}, {"model": 0}, ValueError, "size of at least 1, but got 'model': 0"),
    ],
)
def test_what_cannot_be_made_is_refused(
    function: str, settings: dict, pool: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message).replace(r"\.\*", ".*")):
        LibraryNetwork(function, settings, MEAN, STD, pool)


def test_a_layer_without_maps_is_not_pooled(images: torch.Tensor) -> None:
    network = LibraryNetwork("torch.nn.Flatten", {}, MEAN, STD, {"model": 2})
    with pytest.raises(ValueError, match=r"'model' of `pool`.*but got \(2, 3072\)"):
        FeatureNetwork(network, ["model"]).features(images)


def test_what_gives_more_than_logits_is_refused(images: torch.Tensor) -> None:
    network = LibraryNetwork("torch.nn.GRU", {"input_size": 32, "hidden_size": 4}, MEAN, STD)
    with pytest.raises(ValueError, match=r"torch\.nn\.GRU to give logits, but got a tuple.*aux_logits"):
        network(images[0])
