"""LightningModules: the backbone and the surrogate."""

from lightning_advknn.modules.backbone import BackboneModule
from lightning_advknn.modules.surrogate import SurrogateModule
from lightning_advknn.modules.weights import load_weights

__all__ = ["BackboneModule", "SurrogateModule", "load_weights"]
