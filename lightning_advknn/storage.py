"""Atomic files with checksums, locks between processes, and hashes for keys."""

import errno
import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lightning_advknn import __version__

_DIGEST = "digest"  # key in JSON files, and in the metadata of safetensors files
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # errors of file systems without locks
_REMEDY = "Restore it, or delete it and run the command that made it again."


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` on success.

    Args:
        path: Path of the finished file. Its folder is created, and an existing file is replaced.

    Raises:
        OSError: If the folder cannot be written.
    """
    check_writable(path.parent)
    temporary = path.with_name(f".{path.name}.{_process()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Create a folder, and raise an OSError unless files can be written in it."""
    probe = folder / f".{_process()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread may have deleted it
    except OSError as error:
        raise OSError(
            f"Expected to be able to write in {folder}, but got: {error.strerror or error}. Choose another"
            " output folder."
        ) from error


@contextmanager
def locked(path: Path, what: str | None, wait: bool = True) -> Iterator[float]:
    """Hold a lock while making a file; yield the seconds of waiting for a process that may have made it.

    The lock is a hidden file beside the file, and is deleted afterwards. The system frees it when its process
    ends, even after a crash. On a file system without locks, a warning is shown and nobody waits; files are
    still written atomically.

    Args:
        path: Path of the file to make.
        what: What is made, for the message to processes that wait; None for no message.
        wait: Whether to wait for other processes.

    Raises:
        OSError: If the folder cannot be written.
        TimeoutError: If another process holds the lock and `wait` is false.
    """
    check_writable(path.parent)
    file = path.with_name(f".{path.name}.lock")
    # A soft lock, which is the existence of a file, would outlive a killed process. With mode 0o666, other
    # users can lock the file that a killed process leaves.
    lock = FileLock(file, poll_interval=0.1, fallback_to_soft=False, mode=0o666)
    waited = 0.0
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise
            if what is not None:
                tqdm.write(f"waiting for another run that makes {what}", file=sys.stderr)
            started = time.perf_counter()
            lock.acquire()
            waited = time.perf_counter() - started
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"Expected to be able to lock files in {path.parent}, but got: {error.strerror}. Concurrent runs"
            " that"
            " share it will do the same work twice; choose another folder.",
            stacklevel=3,
        )
    try:
        yield waited
    finally:
        # A process that has opened the deleted file notices that, and locks a new one.
        with suppress(OSError):
            file.unlink()
        lock.release()


def _process() -> str:
    """A name of this process that is unique among machines."""
    return f"{platform.node()}.{os.getpid()}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with each list of numbers on one line, and a checksum if it is an object."""
    if isinstance(content, dict):
        content = {**content, _DIGEST: digest(json.loads(json.dumps(content)))}  # of what will be read
    text = json.dumps(content, indent=2, allow_nan=False)
    # Strings in JSON have no line breaks, so this matches lists only.
    text = re.sub(r"\[\n([-+.\dEe,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON of `write_json`.

    Raises:
        ValueError: If the file is damaged or was changed.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {path} to be as it was written, but it is damaged: {error}. {_REMEDY}"
        ) from error
    # Files of earlier versions have no digest.
    if isinstance(content, dict) and content.pop(_DIGEST, None) not in (None, digest(content)):
        raise ValueError(f"Expected {path} to be as it was written, but it has changed since. {_REMEDY}")
    return content


def digest(content: Any) -> str:
    """Short hash of plain values, as in JSON; equal contents have equal hashes.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Short hash of named tensors: names, dtypes, shapes and contents."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # As bytes, because NumPy has no bfloat16.
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Short hash of a module's parameters and persistent buffers."""
    return tensors_digest(module.state_dict())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file atomically, with a checksum.

    Args:
        path: Path of the file.
        tensors: Tensors by name, on any device.
        metadata: Strings to store with them.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, {**metadata, _DIGEST: digest([dict(metadata), tensors_digest(kept)])})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors of `save_tensors`, on the CPU, and their metadata.

    Raises:
        ValueError: If the file is truncated, changed, or of another kind.
        OSError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as kept:
            # Copies, because safetensors maps the file, which may change.
            tensors = {name: kept.get_tensor(name).clone() for name in kept.keys()}
            metadata = dict(kept.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"Expected {path} to be as it was written, but it is damaged: {error}.") from error
    if metadata.pop(_DIGEST, None) != digest([metadata, tensors_digest(tensors)]):
        raise ValueError(f"Expected {path} to be as it was written, but it has changed since.")
    return tensors, metadata


def file_digest(path: Path) -> str:
    """Short hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def code_of(path: str) -> list[str]:
    """Identify the code behind an import path, so that edits are noticed.

    Returns:
        Hash of the source file, and version of the package.

    Raises:
        ImportError: If its module cannot be imported.
    """
    name, _, attribute = path.rpartition(".")
    found = getattr(import_module(name), attribute, None)
    module = import_module(getattr(found, "__module__", None) or name)
    package = import_module(module.__name__.partition(".")[0])
    file = getattr(module, "__file__", None)
    return [file_digest(Path(file)) if file else "", str(getattr(package, "__version__", ""))]


def versions() -> dict[str, str]:
    """Versions of the software, for results."""
    packages = ("torch", "torchvision", "pytorch-lightning", "torchmetrics")
    return {
        "lightning-advknn": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
