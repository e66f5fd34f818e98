"""A small project to damage: configurations and data files of every kind, with experiments of seconds."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from lightning_advknn.data import Digits

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINING = "configs/digits/backbone.yaml"
EXPERIMENT = "configs/digits/attack.yaml"
SVHN = "configs/svhn/attack.yaml"
FOLDER = "configs/folder/attack.yaml"
BOARD = "configs/digits/leaderboard.yaml"
GRID = "configs/digits/reproduce.yaml"


def write_project(home: Path, images: int = 60, epochs: int = 2) -> None:
    """Write configurations and data files.

    The data are the embedded digits in the formats of MNIST and SVHN, with checksums off, and as a folder of
    images.

    Args:
        home: Empty folder.
        images: Number of test images to attack.
        epochs: Epochs of the backbone; surrogates train for twice as many.
    """
    splits = [Digits().load(train) for train in (True, False)]
    _write_idx(home / "data" / "MNIST" / "raw", splits)
    _write_mat(home / "data", splits)
    for data, name, shape in (("digits", "MNIST", [1, 28, 28]), ("svhn", "SVHN", [3, 32, 32])):
        folder = home / "configs" / data
        shutil.copytree(CONFIGS / data, folder)
        own = {"root": "data", "download": False, "verify_checksums": False, "val_size": 100}
        own |= {"batch_size": 50, "calibration_per_class": 10}
        _write(folder / "data.yaml", {"class_path": f"lightning_advknn.data.{name}", "init_args": own})
        for kind in ("backbone", "surrogate"):
            training = _read(folder / f"{kind}.yaml")
            training["model"]["init_args"] |= {"image_shape": shape}
            _write_training(folder / f"{kind}.yaml", training, epochs if kind == "backbone" else 2 * epochs)
        _shorten(folder, images)
    _write_folder(home, splits)


def _write_folder(home: Path, splits: Any) -> None:
    """Write 30 training and 8 test images of each class, and the configurations for folders of images."""
    for part, (images, labels), n in zip(("train", "test"), splits, (30, 8), strict=True):
        for label in range(10):
            folder = home / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number, image in enumerate(images[labels == label][:n]):
                kind = ("png", "jpg", "bmp")[number % 3]
                Image.fromarray(image[0].numpy()).save(folder / f"{number:02d}.{kind}")
    folder = home / "configs" / "folder"
    shutil.copytree(CONFIGS / "folder", folder)
    data = _read(folder / "data.yaml")
    data["init_args"] |= {"batch_size": 50, "val_size": 50, "calibration_per_class": 2}
    _write(folder / "data.yaml", data)
    for kind in ("backbone", "surrogate"):
        _write_training(folder / f"{kind}.yaml", _read(folder / f"{kind}.yaml"), 1)
    experiment = _read(folder / "attack.yaml")
    experiment["attacks"] = {"fgsm": experiment["attacks"]["fgsm"]}
    _write(folder / "attack.yaml", experiment | {"images": 20})


def _write_training(path: Path, training: dict[str, Any], epochs: int) -> None:
    trainer = training["trainer"]
    trainer |= {"max_epochs": epochs, "log_every_n_steps": 5}
    trainer["logger"] = trainer["logger"][:1]  # the one that writes files
    measures = trainer["callbacks"][1]["init_args"]
    measures |= {"num_images": 10, "num_calibration": 20}
    measures["attacks"] = {"fgsm": measures["attacks"]["fgsm"]}
    _write(path, training)


def _shorten(folder: Path, images: int) -> None:
    """Set few images and steps, and keep one surrogate."""
    experiment = _read(folder / "attack.yaml")
    experiment["surrogates"] = {"dknnb_cl": experiment["surrogates"]["dknnb_cl"]}
    experiment["attacks"]["bim"]["settings"]["steps"] = 3
    experiment["victim"]["k"] = 25
    _write(folder / "attack.yaml", experiment | {"images": images})
    if (folder / "leaderboard.yaml").is_file():
        board = _read(folder / "leaderboard.yaml")
        board |= {"surrogates": experiment["surrogates"], "joint": {}, "images": images}
        minimum = {"settings": {"norm": "l2", "neighbours": 40, "steps": 4}, "through": "dknnb_cl"}
        board["attacks"] = {
            "fgsm": {"function": "fgsm", "vary": {"eps": [0.1, 0.2]}},
            "minimum_l2": {"function": "minimum_norm", "targets": ["dknn"], **minimum},
        }
        _write(folder / "leaderboard.yaml", board)
        parts = {"digits": {"tables": {"config": "attack.yaml", "seeds": [0]}}}
        _write(folder / "reproduce.yaml", {"parts": parts, "results": "results", "output": "runs/reproduce"})


def _write_idx(folder: Path, splits: Any) -> None:
    folder.mkdir(parents=True)
    for prefix, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        for name, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels.to(torch.uint8))):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())


def _write_mat(folder: Path, splits: Any) -> None:
    for prefix, (images, labels) in zip(("train", "test"), splits, strict=True):
        large = F.interpolate(images.float(), size=(32, 32), mode="bilinear").round().to(torch.uint8)
        colour = large.expand(-1, 3, -1, -1).permute(2, 3, 1, 0).numpy()
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(folder / f"{prefix}_32x32.mat", {"X": colour, "y": digits})


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
