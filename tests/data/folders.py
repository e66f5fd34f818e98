"""A small folder of images."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_advknn.data import ImageFolder

SPLITS = ("train", "val", "calibration", "test")
CLASSES = ("ant", "bee", "cat")
SMALL = {"val_size": 4, "calibration_per_class": 2, "batch_size": 7}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def warned(root: Path, **options: object) -> tuple[ImageFolder, str]:
    """The data, and its one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = ImageFolder(str(root), **{**SMALL, **options})
        data.setup()
        data.setup()
        other = ImageFolder(str(root), **{**SMALL, **options})
        other.share(data)
    assert other.note == data.note
    assert len(caught) <= 1
    return data, "".join(str(each.message) for each in caught)
