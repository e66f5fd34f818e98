"""Field cases: what a user does and what should happen; and the small experiment that cases change."""

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import attack as attack_script
from lightning_advknn.commands.train import main as train_script

CLASSES = ("c0", "c1", "c2", "c3")
TRAIN, TEST = 60, 30  # images of each class


class Outcome(NamedTuple):
    """What happened in a case."""

    words: str
    ok: bool
    """Whether this should happen."""


class Case(NamedTuple):
    """Something a user does."""

    case: str
    """Its name: ``<number>-<what>`` for a reported case, otherwise ``<topic>-<what>``."""
    input: str
    """What the user does, in one sentence."""
    expected: str
    """What should happen."""
    run: Callable[[Path], Outcome]
    """Runs the case in an empty folder."""


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str
    """Its stderr, with warnings."""

    def refused(self, *words: str, code: int = 2) -> Outcome:
        """The outcome of a case that should end with an error.

        Args:
            words: Each must be in stderr, in upper or lower case.
            code: The exit code.
        """
        last = next((line for line in reversed(self.err.splitlines()) if line.strip()), "")
        ok = self.code == code and all(word.lower() in self.err.lower() for word in words)
        return Outcome(f"exit {self.code}: {last[-300:]}", ok and "Traceback" not in self.err)


def in_python(name: str, what: str, expected: str, run: Callable[[], Outcome]) -> Case:
    """A case that needs no folder."""
    return Case(name, what, expected, lambda _folder: run())


def write_images(
    root: Path, classes: Mapping[int, str] | None = None, train: int = TRAIN, test: int = TEST
) -> None:
    """Write digits as RGB PNG files of 16x16 pixels to ``root/{train,test}/<class>/``.

    Args:
        root: The folder.
        classes: Class names by digit.
        train: Number of training images of each class.
        test: Number of test images of each class.
    """
    digits = load_digits()
    for digit, name in (classes or dict(enumerate(CLASSES))).items():
        for number, pixels in enumerate(digits.images[digits.target == digit][: train + test]):
            path = root / ("train" if number < train else "test") / name / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            large = np.kron(pixels / 16 * 255, np.ones((2, 2))).round().astype(np.uint8)
            Image.fromarray(np.stack([large] * 3, -1)).save(path)


def small_experiment(folder: Path, images: bool = True, **changes: Any) -> None:
    """Write images and configurations of a small experiment: ``attack.yaml``, ``backbone.yaml`` and others.

    Args:
        folder: The folder.
        images: Whether to write the images too.
        changes: By configuration, values by dotted name: ``attack={"victim.k": 7}``,
            ``network={"init_args.function": "..."}``, ``backbone={"trainer.max_epochs": 1}``. None removes an
            entry.
    """
    if images:
        write_images(folder / "images")
    modules = {
        "network": "network.yaml",
        "layers": ["model.relu1", "model.relu2", "model.fc"],
        "image_shape": [3, 16, 16],
        "num_classes": 4,
        "learning_rate": 0.01,
    }
    configurations: dict[str, Any] = {
        "network": {
            "class_path": "lightning_advknn.models.LibraryNetwork",
            "init_args": {"function": "reliability.networks.Small", "settings": {"num_classes": 4}},
        },
        "data": {
            "class_path": "lightning_advknn.data.ImageFolder",
            "init_args": {"root": "images", "batch_size": 32, "val_size": 40, "calibration_per_class": 10},
        },
        "backbone": {
            "model": {"class_path": "lightning_advknn.modules.BackboneModule", "init_args": modules},
            **_training("val/acc", "max", 6),
        },
        "surrogate": {
            "model": {
                "class_path": "lightning_advknn.modules.SurrogateModule",
                "init_args": {
                    **{name: value for name, value in modules.items() if name != "layers"},
                    "backbone_checkpoint": "backbone.ckpt",
                    "layer": "model.relu2",
                    "k": 5,
                },
            },
            **_training("val/loss", "min", 4),
        },
        "attack": {
            "backbone": {"config": "backbone.yaml"},
            "surrogates": {"dknnb": {"config": "surrogate.yaml"}},
            "victim": {"layer": "model.relu2", "k": 5},
            "attacks": {"fgsm": {"function": "fgsm", "settings": {"eps": 0.1}}},
            "label_source": "true",
            "output": "runs/experiment",
            "cache": "runs/cache",
        },
    }
    for name, values in changes.items():
        for path, value in values.items():
            _put(configurations[name], path.split("."), value)
    for name, content in configurations.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def attack(folder: Path, *arguments: str) -> Ran:
    """Run ``attack.py`` in a folder, in this process."""
    return _run(folder, lambda: attack_script.main(list(arguments)))


def evaluate(folder: Path, *arguments: str) -> Ran:
    """Run ``attack.py evaluate --config attack.yaml`` in the folder of a `small_experiment`."""
    return attack(folder, "evaluate", "--config=attack.yaml", "--device=cpu", *arguments)


def train(folder: Path, *arguments: str) -> Ran:
    """Run ``train.py`` in a folder, in this process."""
    return _run(folder, lambda: train_script(list(arguments)))


def _training(monitor: str, mode: str, epochs: int) -> dict[str, Any]:
    picker = {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {"filename": "best", "monitor": monitor, "mode": mode, "save_last": True},
    }
    logger = {
        "class_path": "pytorch_lightning.loggers.CSVLogger",
        "init_args": {"save_dir": "runs/training", "name": "log"},
    }
    return {
        "seed_everything": 0,
        "data": "data.yaml",
        "trainer": {"max_epochs": epochs, "log_every_n_steps": 5, "callbacks": [picker], "logger": [logger]},
    }


def _put(content: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
    if value is None:
        content.pop(path[-1], None)
    else:
        content[path[-1]] = value


def _run(folder: Path, work: Callable[[], int | None]) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with _at(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = work() or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:  # a user would see the traceback
            traceback.print_exc()
            code = 1
    return Ran(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _at(folder: Path) -> Iterator[None]:
    """Work in a folder, with W&B disabled and warnings on stderr, even under a test runner."""

    def show(message: Warning | str, kind: type[Warning], *_place: Any) -> None:
        sys.stderr.write(f"{kind.__name__}: {message}\n")

    with (
        contextlib.chdir(folder),
        warnings.catch_warnings(),
        mock.patch.dict(os.environ, WANDB_MODE="disabled"),
    ):
        warnings.showwarning = show
        yield
