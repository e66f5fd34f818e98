"""Labels and images of other types, shapes and sizes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_advknn.attacks import fgsm, sitawarin_wagner_linf
from lightning_advknn.data import Digits
from lightning_advknn.data.base import ImageDataModule
from lightning_advknn.evaluation import judge, make_rows
from lightning_advknn.functional import l2_distortion
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.build import build_banks
from reliability.case import Case, Outcome
from reliability.small_victim import (
    CLASSES,
    SHAPE,
    N,
    equal,
    make_images,
    make_labels,
    make_network,
    make_victim,
    refused,
)


class OwnData(ImageDataModule):
    """A user's data module.

    Args:
        convert: Applied to the int64 labels that `load` returns.
    """

    image_shape = SHAPE
    num_classes = CLASSES

    def __init__(self, convert: Callable[[Tensor], Any]) -> None:
        super().__init__(val_size=6, calibration_per_class=2)
        self.name, self._convert = "own", convert

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """24 images of 3 classes."""
        images = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(int(train)))
        return (images * 255).byte(), self._convert(make_labels())


def _load(convert: Callable[[Tensor], Any], folder: Path) -> Outcome:
    same = OwnData(convert).fingerprint == OwnData(lambda labels: labels).fingerprint
    return Outcome(f"data {'as' if same else 'not as'} with int64 labels", same)


def _load_refused(convert: Callable[[Tensor], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    return refused(OwnData(convert).setup, *words)


def _attack_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return refused(lambda: fgsm(make_network(), make_images(), labels, eps=0.1), *words)


def _bank_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return refused(lambda: MemoryBank(make_images().flatten(1), labels, torch.arange(N), CLASSES), *words)


def _victim_labels(labels: Any, words: tuple[str, ...], folder: Path) -> Outcome:
    return refused(lambda: make_victim(labels=labels), *words)


def _victim_attack(labels: Tensor, words: tuple[str, ...], folder: Path) -> Outcome:
    attack = partial(sitawarin_wagner_linf, make_victim(), eps=0.1, steps=1)
    return refused(lambda: attack(make_images(), labels), *words)


def _split(folder: Path) -> Outcome:
    sizes = {"val_size": np.int64(100), "split_seed": np.int64(1)}
    found, expected = Digits(**sizes), Digits(val_size=100, split_seed=1)
    found.share(Digits(val_size=150, split_seed=1))  # they differ: nothing is shared
    return equal(found.split("val").ids, expected.split("val").ids, "validation images")


def _rows(folder: Path) -> Outcome:
    victim, images = make_victim(), make_images()
    verdicts = judge(victim, "relu", images)
    return refused(
        lambda: make_rows(torch.arange(N), make_labels() + 1, images, images, verdicts, verdicts), "[0, 2]"
    )


def _asked(convert: Callable[[Tensor], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    victim, images = make_victim(), convert(make_images())
    outcomes = [
        refused(partial(ask, images), *words)
        for ask in (victim, partial(judge, victim, "relu"), victim.only("relu"))
    ]
    return Outcome(outcomes[0].words, all(outcome.ok for outcome in outcomes))


def _double(folder: Path) -> Outcome:
    victim, images = make_victim(), make_images()
    return equal(victim(images.double()), victim(images), "vote shares")


def _empty(what: str, folder: Path) -> Outcome:
    victim = make_victim()
    work = {
        "calibration": lambda: victim.calibrate([]),
        "bank": lambda: build_banks(victim.network, [], CLASSES),
    }
    return refused(work[what], "Expected", "images", "got none")


def _pairs(folder: Path) -> Outcome:
    pairs: Any = [(make_images(), make_labels())]
    return refused(lambda: make_victim().calibrate(pairs), "Batch", "tuple")


def _shapes(folder: Path) -> Outcome:
    return refused(lambda: l2_distortion(make_images()[:, :1], make_images()), "one shape")


def _one_class(folder: Path) -> Outcome:
    victim = make_victim(labels=torch.ones(N).long())
    return equal(victim.predict(make_images()), torch.ones(N).long(), "predictions")


_AS_INTEGERS = "The same data as with int64 labels."
_SAID = "An error with a remedy."

CASES = [
    Case(
        "late-labels-int32",
        "Your own data module gives int32 labels.",
        _AS_INTEGERS,
        partial(_load, Tensor.int),
    ),
    Case(
        "late-labels-uint8",
        "Your own data module gives uint8 labels.",
        _AS_INTEGERS,
        partial(_load, Tensor.byte),
    ),
    Case(
        "late-labels-float",
        "Your own data module gives floats as labels.",
        _SAID,
        partial(_load_refused, Tensor.float, (".long()",)),
    ),
    Case(
        "late-labels-one-hot",
        "Your own data module gives one-hot labels.",
        _SAID,
        partial(_load_refused, nn.functional.one_hot, ("argmax(1)",)),
    ),
    Case(
        "late-labels-numpy",
        "Your own data module gives a NumPy array of labels.",
        _SAID,
        partial(_load_refused, Tensor.numpy, ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-column",
        "An attack with labels (n, 1).",
        _SAID,
        partial(_attack_labels, make_labels()[:, None], ("squeeze(1)",)),
    ),
    Case(
        "late-labels-list",
        "An attack with a list of labels.",
        _SAID,
        partial(_attack_labels, make_labels().tolist(), ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-ignored",
        "An attack with labels -100, which cross-entropy ignores.",
        _SAID,
        partial(_attack_labels, torch.full((N,), -100), ("at least 0", "-100")),
    ),
    Case(
        "late-labels-too-high",
        "An attack with a label above the last class.",
        _SAID,
        partial(_attack_labels, torch.full((N,), CLASSES), ("[0, 2]",)),
    ),
    Case(
        "late-labels-bank",
        "A MemoryBank with int32 labels.",
        _SAID,
        partial(_bank_labels, make_labels().int(), (".long()",)),
    ),
    Case(
        "late-labels-bank-numpy",
        "A MemoryBank with a NumPy array of labels.",
        _SAID,
        partial(_bank_labels, make_labels().numpy(), ("torch.as_tensor",)),
    ),
    Case(
        "late-labels-victim",
        "A bank and calibration with floats as labels.",
        _SAID,
        partial(_victim_labels, make_labels() + 0.7, (".long()",)),
    ),
    Case("late-labels-from-one", "Rows with labels that count from 1.", _SAID, _rows),
    Case(
        "late-images-numpy",
        "A victim is queried with a NumPy array.",
        _SAID,
        partial(_asked, Tensor.numpy, ("torch.as_tensor",)),
    ),
    Case(
        "late-images-double",
        "A victim is queried with float64 images.",
        "The answer to them as stored, in float32.",
        _double,
    ),
    Case(
        "late-images-bytes",
        "A victim is queried with uint8 images.",
        _SAID,
        partial(_asked, lambda images: (images * 255).byte(), ("255",)),
    ),
    Case(
        "late-images-nhwc",
        "A victim that flattens is queried with images with channels last.",
        _SAID,
        partial(_asked, lambda images: images.movedim(1, -1), ("(B, 3, 4, 4)",)),
    ),
    Case(
        "late-images-one",
        "A victim is queried with one image without a batch.",
        _SAID,
        partial(_asked, lambda images: images[0], ("(B, 3, 4, 4)",)),
    ),
    Case(
        "late-labels-victims-attack",
        "An attack on a victim with labels above its last class.",
        _SAID,
        partial(_victim_attack, torch.full((N,), 9), ("[0, 2]",)),
    ),
    Case(
        "late-split-numpy",
        "Sizes and seed of a split are NumPy integers.",
        "The same splits as with Python's numbers.",
        _split,
    ),
    Case("late-calibration-empty", "Calibration without images.", _SAID, partial(_empty, "calibration")),
    Case("late-bank-empty", "A bank without images.", _SAID, partial(_empty, "bank")),
    Case("late-batches", "Calibration with pairs (images, labels).", _SAID, _pairs),
    Case("late-shapes", "L2 between grey and colour images.", _SAID, _shapes),
    Case("late-one-class", "A bank of one of three classes.", "That class.", _one_class),
]
