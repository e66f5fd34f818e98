"""Loading and editing of checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_advknn.modules import BackboneModule, load_weights


def load(module: BackboneModule, path: Path, data_name: str = "Digits") -> None:
    load_weights(module, path, module.identity(data_name))


def rewrite(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Save an edited copy of a checkpoint."""
    checkpoint = torch.load(source, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, target)
    return target


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that sets a value."""

    def edit(checkpoint: dict[str, Any]) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return edit


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that removes a key."""

    def edit(checkpoint: dict[str, Any]) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return edit


def spoil(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    """Edit that replaces one number of a weight."""

    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name].view(-1)[-1] = value

    return edit
