"""DkNNB, the paper's differentiable stand-in for a kNN, on one layer or several."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.models.features import FeatureNetwork
from lightning_advknn.models.frozen import Frozen


class DkNNB(nn.Linear):
    """Deep kNN block: one linear layer from a layer's features (not normalised) to class scores.

    Args:
        in_features: D of the layer.
        num_classes: C.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)


class Surrogate(Frozen):
    """A frozen backbone up to one layer, then DkNNB: a plain logits module that any attack can differentiate.

    It is always in evaluation mode.

    Args:
        network: The victim's backbone.
        layer: Layer whose features DkNNB reads.
        dknnb: The trained block.
    """

    def __init__(self, network: nn.Module, layer: str, dknnb: DkNNB) -> None:
        super().__init__()
        self.backbone = FeatureNetwork(network, [layer])
        self.layer = layer
        self.dknnb = dknnb
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of q(x), ``(B, C)``, for images in [0, 1]."""
        logits: Tensor = self.dknnb(self.backbone.features(images)[self.layer])
        return logits


class JointSurrogate(Frozen):
    """Surrogates of several layers as one logits module: what DkNN's sum over layers (Eq. 4) looks like through them.

    It is always in evaluation mode.

    Args:
        network: The victim's backbone.
        dknnbs: The trained block of each layer, by the layer's name.
    """

    def __init__(self, network: nn.Module, dknnbs: Mapping[str, DkNNB]) -> None:
        super().__init__()
        self.backbone = FeatureNetwork(network, list(dknnbs))
        self.dknnbs = nn.ModuleList(dknnbs.values())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` whose softmax is the mean of the layers' q(x), for images in [0, 1]."""
        features = self.backbone.features(images)
        log_q = [
            F.log_softmax(dknnb(features[layer]), dim=1)
            for layer, dknnb in zip(self.backbone.layers, self.dknnbs, strict=True)
        ]
        return torch.stack(log_q).logsumexp(0)  # the mean's factor 1 / L shifts all alike
