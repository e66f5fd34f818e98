"""Files that are whole or not there, and keys that name what they depend on."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to; on success it becomes `path`.

    Args:
        path: Where the result goes; its folder is made, an existing file is replaced.

    Raises:
        OSError: If the folder cannot be written.
    """
    check_writable(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder and raise an OSError unless files can be written in it."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"Expected to be able to write in {folder}, but got: {error.strerror or error}. Choose another output folder."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, each list of numbers in one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    # Within a text, JSON has no line breaks, so this finds lists only.
    text = re.sub(r"\[\n([-+.\dEe,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold; equal contents have equal hashes.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Short hash of named tensors: names, dtypes, shapes and contents."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # As bytes: numpy knows no bfloat16.
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Short hash of a module's parameters and persistent buffers."""
    return tensors_digest(module.state_dict())


def file_digest(path: Path) -> str:
    """Short hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
