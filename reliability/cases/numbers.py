"""Arguments that are NumPy's numbers, floats or booleans."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_advknn.attacks import bim, fgsm
from lightning_advknn.experiment.settings import Experiment, VictimSettings
from lightning_advknn.functional import knn_prediction
from lightning_advknn.modules import SurrogateModule
from reliability.case import Case, Outcome, evaluate, small_experiment
from reliability.small_victim import (
    digits_network,
    equal,
    make_images,
    make_labels,
    make_network,
    make_victim,
    refused,
)


def _numpy_k(folder: Path) -> Outcome:
    return equal(make_victim(np.int64(5))(make_images()), make_victim(5)(make_images()), "predictions")


def _numpy_checkpoint(folder: Path) -> Outcome:
    module = SurrogateModule(
        digits_network(),
        "none.ckpt",
        "relu",
        image_shape=np.array([1, 28, 28]),  # type: ignore[arg-type]
        num_classes=np.int64(10),  # type: ignore[arg-type]
        k=np.int64(5),  # type: ignore[arg-type]
        learning_rate=np.float64(1e-3),
    )
    torch.save(dict(module.hparams), folder / "hparams.pt")
    loaded = torch.load(folder / "hparams.pt", weights_only=True)
    return Outcome(f"loads: k = {loaded['k']}", loaded["k"] == 5)


def _wrong_k(k: Any, folder: Path) -> Outcome:
    return refused(lambda: make_victim(k), "`k`", "whole number")


def _numpy_experiment(folder: Path) -> Outcome:
    victim = VictimSettings(k=np.int64(5))  # type: ignore[arg-type]
    found = Experiment(None, {}, {}, victim, images=np.int64(12), seed=np.int64(3))  # type: ignore[arg-type]
    kept = json.dumps([found.victim.k, found.images, found.seed])  # as keys and results keep them
    return Outcome(kept, kept == "[5, 12, 3]")


def _float_images(folder: Path) -> Outcome:
    images: Any = 10.0
    return refused(lambda: Experiment(None, {}, {}, images=images), "`images`", "whole number")


def _eps(folder: Path) -> Outcome:
    attacked = [
        fgsm(make_network(), make_images(), make_labels(), eps=eps) for eps in (np.float32(0.25), 0.25)
    ]
    return equal(*attacked, "adversarials")


def _settings(settings: Mapping[str, Any], words: tuple[str, ...], folder: Path) -> Outcome:
    return refused(lambda: bim(make_network(), make_images(), make_labels(), **settings), *words)


def _option(option: str, folder: Path) -> Outcome:
    small_experiment(folder)
    return evaluate(folder, option).refused(option.removeprefix("--").partition("=")[0].rpartition(".")[2])


def _votes(folder: Path) -> Outcome:
    # 26 is the largest. In uint8, 26 * 10 overflows to 4.
    votes = torch.tensor([[24, 26, 0, 0, 0, 0, 0, 0, 0, 25]], dtype=torch.uint8)
    return equal(knn_prediction(votes), torch.tensor([1]), "the class with most votes")


_SAID = "An error with a remedy."
_BEFORE = "Refused before long work."
_RIGHT = "The same results as with Python's numbers."

CASES = [
    Case("late-k-numpy", "k is a NumPy integer.", _RIGHT, _numpy_k),
    Case(
        "late-hparams-numpy",
        "Arguments of a module are NumPy's numbers.",
        "Its checkpoint loads.",
        _numpy_checkpoint,
    ),
    Case(
        "late-experiment-numpy",
        "k, images and seed of an Experiment are NumPy integers.",
        _RIGHT,
        _numpy_experiment,
    ),
    Case(
        "late-images-float",
        "images of an Experiment is 10.0.",
        _SAID,
        _float_images,
    ),
    Case("late-k-float", "k is 5.0.", _SAID, partial(_wrong_k, 5.0)),
    Case("late-k-bool", "k is True.", _SAID, partial(_wrong_k, True)),
    Case("late-k-numpy-bool", "k is NumPy's True.", _SAID, partial(_wrong_k, np.True_)),
    Case("late-option-k-bool", "attack.py --victim.k true.", _BEFORE, partial(_option, "--victim.k=true")),
    Case("late-option-k-float", "attack.py --victim.k 5.0.", _BEFORE, partial(_option, "--victim.k=5.0")),
    Case(
        "late-option-layers-twice",
        "attack.py with a layer twice in victim.layers.",
        _BEFORE,
        partial(_option, "--victim.layers=[model.relu2,model.relu2]"),
    ),
    Case("late-eps-numpy", "eps is NumPy's float32.", _RIGHT, _eps),
    Case(
        "late-eps-bool",
        "eps is True.",
        _SAID,
        partial(_settings, {"eps": True, "step_size": 0.1, "steps": 1}, ("`eps`", "one number")),
    ),
    Case(
        "late-eps-array",
        "eps is an array.",
        _SAID,
        partial(_settings, {"eps": np.array(0.1), "step_size": 0.1, "steps": 1}, ("`eps`", "one number")),
    ),
    Case("late-votes-bytes", "Votes in uint8.", "The class with the most votes.", _votes),
]
