"""LightningModules: the backbone and the surrogate."""

from lightning_advknn.modules.backbone import BackboneModule
from lightning_advknn.modules.checkpoint import load_weights
from lightning_advknn.modules.surrogate import SurrogateModule

__all__ = ["BackboneModule", "SurrogateModule", "load_weights"]
