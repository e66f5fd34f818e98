"""What every public function expects of images."""

from torch import Tensor


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless every pixel is finite and in [0, 1]."""
    if not images.is_floating_point():
        raise ValueError(
            f"Expected floating-point images in [0, 1], but got {images.dtype}. Divide uint8 by 255."
        )
    if not images.numel():
        return
    low, high = images.aminmax()
    # NaN fails every comparison, so this catches it too.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Expected finite images in [0, 1], but got values in [{low.item()}, {high.item()}]."
            " Images are not normalised here: normalisation is a layer of the network."
        )
