"""DkNNB, the paper's differentiable stand-in for a kNN."""

from torch import Tensor, nn

from lightning_advknn.models.features import FeatureNetwork


class DkNNB(nn.Linear):
    """Deep kNN block: one linear layer from a layer's features (not normalised) to class scores.

    Args:
        in_features: D of the layer.
        num_classes: C.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)


class Surrogate(nn.Module):
    """A frozen backbone up to one layer, then DkNNB: a plain logits module that any attack can differentiate.

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

    def forward(self, images: Tensor) -> Tensor:
        """Logits of q(x), ``(B, C)``, for images in [0, 1]."""
        logits: Tensor = self.dknnb(self.backbone.features(images)[self.layer])
        return logits
