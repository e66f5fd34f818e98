"""LeNet5, to which the paper transfers adversarials (Table 3)."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lightning_advknn.models.normalize import Normalize


class LeNet5(nn.Sequential):
    """LeNet5 (LeCun et al., 1998) with ReLU and max pooling, for 28x28 images.

    Layers that can vote: ``relu1``, ``relu2``, ``relu3``, ``relu4`` and ``logits``.

    Args:
        num_classes: C.
        mean: Channel mean of the training images in [0, 1].
        std: Channel standard deviation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(
            OrderedDict(
                normalize=Normalize(mean, std),
                conv1=nn.Conv2d(1, 6, kernel_size=5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, kernel_size=5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(400, 120),
                relu3=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                logits=nn.Linear(84, num_classes),
            )
        )
