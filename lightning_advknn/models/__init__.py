"""Networks: backbones of victims, and surrogates."""

from lightning_advknn.models.convnet import ConvNet
from lightning_advknn.models.determinism import ASKED, check_function, device_of
from lightning_advknn.models.features import OUTPUT, FeatureNetwork
from lightning_advknn.models.frozen import Frozen, kept_modes
from lightning_advknn.models.lenet import LeNet5
from lightning_advknn.models.library import LibraryNetwork
from lightning_advknn.models.normalize import Normalize
from lightning_advknn.models.surrogate import DkNNB, JointSurrogate, Surrogate

__all__ = [
    "ASKED",
    "OUTPUT",
    "ConvNet",
    "DkNNB",
    "FeatureNetwork",
    "Frozen",
    "JointSurrogate",
    "LeNet5",
    "LibraryNetwork",
    "Normalize",
    "Surrogate",
    "check_function",
    "device_of",
    "kept_modes",
]
