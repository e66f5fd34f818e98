"""The files of a layer's features, which `benchmarks.features` makes. Imports are light."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

BANK, KNOWN = "bank.npy", "known.safetensors"


def load_bank(folder: Path, mapped: bool = False) -> Tensor:
    """A layer's bank, float32 ``(M, D)``; if mapped, pages are read when they are needed."""
    return torch.from_numpy(np.load(folder / BANK, mmap_mode="c" if mapped else None))


def load_known(folder: Path) -> dict[str, Tensor]:
    """All of a layer but its bank."""
    return load_file(folder / KNOWN)
