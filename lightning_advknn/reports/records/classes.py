"""Which class has which label, and how many images: what a network's outputs have to be in the order of."""

from typing import Any

from lightning_advknn.data import ImageDataModule
from lightning_advknn.experiment.run import ExperimentRun

_SHOWN = 12  # classes that a line names all of


def classes_line(data: ImageDataModule) -> str:
    """Labels, names and images of the classes in a line: training and test images, of all that the data set has of them."""
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
    return f"Classes of {data.name}, each with its label and its training/test images: {', '.join(each)}"


def classes_of(run: ExperimentRun) -> dict[str, Any]:
    """Names of an experiment's classes in order of labels, and by split how many images each has.

    The split ``attacked`` is of the test images that are attacked.
    """
    data = run.data
    attacked = run.test.labels.bincount(minlength=data.num_classes).tolist()
    return {"names": names_of(data), **data.counts(), "attacked": attacked}


def names_of(data: ImageDataModule) -> list[str]:
    """In order of labels; the labels themselves where a data set has no names for as many."""
    known = len(data.class_names) == data.num_classes
    return list(data.class_names) if known else [str(label) for label in range(data.num_classes)]
