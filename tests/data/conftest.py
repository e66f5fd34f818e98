"""Copies of small data sets, to damage, and a small folder of images."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.folders import save


@pytest.fixture
def mnist_copy(mnist_root, tmp_path):
    return Path(shutil.copytree(mnist_root, tmp_path / "copy"))


@pytest.fixture
def svhn_copy(svhn_root, tmp_path):
    return Path(shutil.copytree(svhn_root, tmp_path / "copy"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 6 training and 5 test images of 8x10 random pixels, written out of order."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for part, n in (("test", 5), ("train", 6)):
        for name in ("cat", "ant", "bee"):
            for number in reversed(range(n)):
                save(folder / part / name / f"{number}.png", rng.integers(0, 256, (8, 10, 3), np.uint8))
    return folder
