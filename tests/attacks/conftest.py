"""A kNN on pixels, where perturbations are known."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_advknn.classifiers import DkNN
from lightning_advknn.models import FeatureNetwork, Normalize
from lightning_advknn.search import MemoryBank


@pytest.fixture
def pixel_knn(device: torch.device) -> Callable[..., DkNN]:
    """Makes a kNN on normalised pixels: ``pixel_knn(images, labels, k, mean, std, metric)``."""

    def make(images: Tensor, labels: Tensor, k: int, mean=(0.0,), std=(1.0,), metric="euclidean"):
        network = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), flatten=nn.Flatten()))
        features = FeatureNetwork(network, ["normalize"]).eval().to(device)
        rows, labels = features.features(images.to(device))["normalize"], labels.to(device)
        bank = MemoryBank(rows, labels, torch.arange(len(rows)), int(labels.max()) + 1, metric)
        return DkNN.on_banks(features, {"normalize": bank}, k).to(device)

    return make
