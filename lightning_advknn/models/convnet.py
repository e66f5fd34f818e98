"""The paper's backbone."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from lightning_advknn.models.normalize import Normalize


class ConvNet(nn.Sequential):
    """Three convolutions and a linear layer, the network of DkNN (arXiv 1803.04765) and of the paper.

    Kernels and strides are DkNN's; paddings are those of the authors' code. Four layers vote: ``relu1``,
    ``relu2``, ``relu3`` and ``logits``. They have 12544 / 6272 / 1152 / 10 features for 1x28x28 images, and
    16384 / 8192 / 2048 / 10 for 3x32x32.

    Args:
        image_shape: Channels, height, width.
        num_classes: C.
        mean: Channel means of the training images in [0, 1].
        std: Channel standard deviations.

    Raises:
        ValueError: If the images are too small for three convolutions.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        channels = image_shape[0]
        convolutions: OrderedDict[str, nn.Module] = OrderedDict(
            normalize=Normalize(mean, std),
            conv1=nn.Conv2d(channels, 64, kernel_size=8, stride=2, padding=3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(64, 128, kernel_size=6, stride=2, padding=2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(128, 128, kernel_size=5),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
        )
        try:
            with torch.no_grad():
                size = nn.Sequential(convolutions)(torch.zeros(1, *image_shape)).shape[1]
        except RuntimeError as error:
            raise ValueError(
                "Expected `image_shape` (channels, height, width) of at least 20x20 pixels and one `mean` for"
                f" each channel, but got {tuple(image_shape)} and {tuple(mean)}."
            ) from error
        super().__init__(OrderedDict(**convolutions, logits=nn.Linear(size, num_classes)))
