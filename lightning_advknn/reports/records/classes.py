"""The classes of a data set: labels, names and numbers of images.

A network's outputs must be in the order of these labels, so every run prints and keeps them.
"""

from typing import Any

from torch import Tensor

from lightning_advknn.data import ImageDataModule

_SHOWN = 12  # a line with more classes than this leaves some out


def classes_line(data: ImageDataModule) -> str:
    """A line with each class's label, name and numbers of training and test images in the whole data set."""
    counts = data.counts()
    train, test = (
        [one + other for one, other in zip(counts[part], counts[rest], strict=True)]
        for part, rest in (("train", "val"), ("test", "calibration"))
    )
    each = [
        f"{label} {own}/{others}" if name == str(label) else f"{label} {name} {own}/{others}"
        for label, (name, own, others) in enumerate(zip(names_of(data), train, test, strict=True))
    ]
    if len(each) > _SHOWN:
        fewest = f"; at least {min(train)}/{min(test)}, at most {max(train)}/{max(test)}"
        each = [*each[: _SHOWN // 2], "...", f"{each[-1]}{fewest}"]
    shown = ", ".join(each)
    return f"Classes of {data.name}, each with its label and its training/test images: {shown}"


def classes_of(data: ImageDataModule, attacked: Tensor) -> dict[str, Any]:
    """Names of classes in order of labels, and numbers of images by split.

    Args:
        data: The data set.
        attacked: Labels of the attacked images, int64 ``(n,)``, which count as the split ``attacked``.
    """
    counts = attacked.bincount(minlength=data.num_classes).tolist()
    return {"names": names_of(data), **data.counts(), "attacked": counts}


def names_of(data: ImageDataModule) -> list[str]:
    """Names in order of labels; the labels themselves where names are missing."""
    known = len(data.class_names) == data.num_classes
    return list(data.class_names) if known else [str(label) for label in range(data.num_classes)]
