"""Checkpoint files: writing, reading without running code, and the identity that they state."""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_advknn.models import (
    LibraryNetwork,
)
from lightning_advknn.storage import atomic_path

IDENTITY = "lightning_advknn"  # key of the identity in a checkpoint
_NAMED = 5  # names that an error lists

Identity = dict[str, str | int | list[int]]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically, even when the disk is full.

    Lightning itself writes to the system's temporary folder and moves the file. Onto another disk that is a
    copy, which may stay incomplete.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; Lightning writes it where the place is not a local path."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch.save hides the reason why it cannot write a file
        torch.save(checkpoint, buffer)
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def describe(network: nn.Module) -> str:
    """Import path of a network's architecture."""
    if isinstance(network, LibraryNetwork):
        return network.function
    return f"{type(network).__module__}.{type(network).__qualname__}"


def check_identity(checkpoint: Mapping[str, Any], expected: Identity, source: str) -> None:
    """Raise a ValueError unless a checkpoint states the expected identity.

    Args:
        checkpoint: From `read_checkpoint`.
        expected: Kind, architecture, data set, classes and so on.
        source: What errors call the checkpoint.
    """
    identity = checkpoint.get(IDENTITY)
    if not isinstance(identity, dict):
        raise ValueError(
            f"Expected {source} to be a checkpoint written by this project's train.py, but it states no"
            " identity."
            + (" Only a backbone may have your own weights." if expected["kind"] != "backbone" else "")
        )
    wrong = [
        f"{name} is {identity.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if identity.get(name) != value
    ]
    if wrong:
        raise ValueError(
            f"Expected {source} to fit this configuration, but its {'; its '.join(wrong)}."
            " Use the checkpoint's own configuration, or train a new one."
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint or a state dict without running code from it.

    Args:
        path: A checkpoint of train.py; a file of torch.save that is a state dict, or holds one under
            ``state_dict`` and no other weights; or a state dict in a ``.safetensors`` file.

    Returns:
        The checkpoint; of other files, a dict with ``state_dict`` only.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is truncated, corrupt or not a checkpoint, would run code, or holds the weights of
            several networks, such as averaged ones.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint at {path}, but there is none. Train it with `python train.py fit --config"
            " ...`."
        )
    if path.suffix == ".safetensors":
        try:
            return {"state_dict": load_file(path)}
        except SafetensorError as error:
            raise ValueError(
                f"Expected {path} to be a whole safetensors file, but reading it failed: {error}. It is"
                " truncated, corrupt or in another format."
            ) from error
    _check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected {path} to hold only tensors and plain values, but loading it would run code or it is"
            " no checkpoint. Refused: use a checkpoint from a source you trust, saved again as plain types."
        ) from error
    except Exception as error:  # the unpickler raises anything for a damaged file
        if "TorchScript" in str(error):
            raise ValueError(
                f"Expected {path} to be a state dict, but it is a TorchScript archive, which is code. Save"
                " `torch.jit.load(path).state_dict()`."
            ) from error
        raise ValueError(
            f"Expected {path} to be a whole checkpoint, but reading it failed: {error}. It is truncated or"
            " corrupt."
        ) from error
    if _is_weights(checkpoint):
        return {"state_dict": dict(checkpoint)}
    if (
        isinstance(checkpoint, dict)
        and IDENTITY in checkpoint
        and isinstance(checkpoint.get("state_dict"), dict)
    ):
        return checkpoint
    return {"state_dict": _only_weights(checkpoint, path)}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _only_weights(content: Any, path: Path) -> dict[Any, Any]:
    """A file's ``state_dict``, if it holds no other weights; else a ValueError that lists what it holds."""
    found = dict(_weights_in(content))
    held = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(held, dict) and found.keys() <= {"['state_dict']"}:
        return held
    if found:
        raise ValueError(
            f"Expected {path} to hold one network's weights, alone or under `state_dict`, but it has some"
            f" under {', '.join(found)}. Save the ones you need alone: `torch.save(torch.load(path,"
            f" weights_only=True){next(iter(found))}, 'chosen.pt')`."
        )
    entries = content if isinstance(content, dict) else {}
    others = [
        f"{name!r}, a {type(value).__name__}"
        for name, value in entries.items()
        if not isinstance(value, Tensor)
    ]
    but = f"it also has {'; '.join(others[:_NAMED])}" if 0 < len(others) < len(entries) else "it does not"
    raise ValueError(
        f"Expected {path} to hold a `state_dict`, or to be one of tensors alone, but {but}. Save"
        " `network.state_dict()`."
    )


def _weights_in(content: Any, place: str = "", depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Dicts and lists of weights in a file, with the keys that lead to them."""
    if not isinstance(content, dict) or "param_groups" in content:  # an optimizer's state
        return
    for name, value in content.items():
        at = f"{place}[{name!r}]"
        tensors = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        # Weights have at least one matrix; statistics and random states have vectors only.
        if all(isinstance(each, Tensor) for each in tensors) and any(each.ndim > 1 for each in tensors):
            yield at, value
        elif depth:
            yield from _weights_in(value, at, depth - 1)


def is_own(checkpoint: Mapping[str, Any], expected: Identity) -> bool:
    """Whether a checkpoint holds a user's backbone weights, which state no identity."""
    return IDENTITY not in checkpoint and expected["kind"] == "backbone"


def _check_sums(path: Path) -> None:
    """Raise a ValueError if a file's checksums are wrong, which torch.load does not verify."""
    if not zipfile.is_zipfile(path):
        return  # torch.load raises an error
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:  # zipfile raises anything for a damaged file
        changed = str(error)
    if changed is not None:
        raise ValueError(
            f"Expected {path} to be as it was written, but its checksums are wrong ({changed}). It is"
            " corrupt: copy it again, or delete it and train again."
        )
