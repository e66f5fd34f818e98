"""A small victim on 24 random images of 3 classes, for cases that call Python functions."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import build_banks
from reliability.case import Outcome

N, CLASSES, SHAPE = 24, 3, (3, 4, 4)


class Spy(nn.Linear):
    """A linear layer that records the precision of its last matrix product."""

    seen: str = ""

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set when torch is imported
        self.seen = matmul.fp32_precision
        return super().forward(features)


def make_labels() -> Tensor:
    """Labels int64 ``(N,)``."""
    return torch.arange(N) % CLASSES


def make_images() -> Tensor:
    """Random images ``(N, *SHAPE)``."""
    return torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0))


def make_network() -> FeatureNetwork:
    """An untrained network with layers ``relu`` and ``logits``, which is a `Spy`."""
    torch.manual_seed(0)
    layers = OrderedDict(
        flatten=nn.Flatten(), hidden=nn.Linear(48, 16), relu=nn.ReLU(), logits=Spy(16, CLASSES)
    )
    return FeatureNetwork(nn.Sequential(layers), ["relu", "logits"]).eval()


def make_victim(k: Any = 5, labels: Any = None) -> DkNN:
    """A DkNN on these images, with other labels if given."""
    network = make_network()
    batch = Batch(make_images(), make_labels() if labels is None else labels, torch.arange(N))
    dknn = DkNN.on_banks(network, build_banks(network, [batch], CLASSES), k)
    dknn.calibrate([batch])
    return dknn


def refused(work: Callable[[], Any], *words: str) -> Outcome:
    """The outcome of a case that should raise a ValueError with these words."""
    try:
        found = work()
    except ValueError as error:
        return Outcome(f"ValueError: {error}", all(word in str(error) for word in words))
    return Outcome(f"no error, but {str(found)[:100]}", False)


def equal(found: Tensor, expected: Tensor, what: str) -> Outcome:
    """The outcome of a case that should give a known tensor."""
    ok = torch.equal(found, expected)
    return Outcome(f"{what} {'as' if ok else 'not as'} expected", ok)


def digits_network() -> nn.Module:
    """An untrained network for the embedded digits, with layers ``relu`` and ``logits``."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), hidden=nn.Linear(784, 16), relu=nn.ReLU(), logits=nn.Linear(16, 10))
    )
