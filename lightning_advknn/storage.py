"""Files that are whole or not there, made by one process at a time, and keys that name what they depend on."""

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

_DIGEST = "digest"  # in JSON, and in the metadata of safetensors files
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what file systems without locks say
_REMEDY = "Restore it, or delete it and run the command that made it again."


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to; on success it becomes `path`.

    Args:
        path: Where the result goes; its folder is made, an existing file is replaced.

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
    """Make a folder and raise an OSError unless files can be written in it."""
    probe = folder / f".{_process()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread may have deleted it
    except OSError as error:
        raise OSError(
            f"Expected to be able to write in {folder}, but got: {error.strerror or error}. Choose another output folder."
        ) from error


@contextmanager
def locked(path: Path, what: str | None, wait: bool = True) -> Iterator[float]:
    """Be the only one that makes a file; yield the seconds that others were waited for, who may have made it.

    The lock is a hidden file beside it, which goes when it is freed. The system frees it when its process
    ends, however that ends. Where files cannot be locked, nobody waits, and a warning says so: files are
    still whole or not there.

    Args:
        path: Of the file that is made.
        what: That is, in words, for who has to wait; None to wait without a word.
        wait: For others.

    Raises:
        OSError: If the folder cannot be written.
        TimeoutError: Without `wait`, if another one makes it.
    """
    check_writable(path.parent)
    file = path.with_name(f".{path.name}.lock")
    # The other kind of lock, a file that is there or not, would outlive a killed process. What a killed one
    # leaves, other users of the folder may lock too.
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
            f"Expected to be able to lock files in {path.parent}, but got: {error.strerror}. Runs that share it at the same time"
            " will do the same work twice.",
            stacklevel=3,
        )
    try:
        yield waited
    finally:
        # Who has opened it meanwhile sees that it is gone, and takes a new one.
        with suppress(OSError):
            file.unlink()
        lock.release()


def _process() -> str:
    """A name for this process among all that share a folder: machines may have processes of one number."""
    return f"{platform.node()}.{os.getpid()}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, each list of numbers in one line, with what tells damage later if it is an object."""
    if isinstance(content, dict):
        content = {**content, _DIGEST: digest(json.loads(json.dumps(content)))}  # as it reads back
    text = json.dumps(content, indent=2, allow_nan=False)
    # Within a text, JSON has no line breaks, so this finds lists only.
    text = re.sub(r"\[\n([-+.\dEe,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """JSON that `write_json` wrote.

    Raises:
        ValueError: If the file is not what was written.
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all, with what tells damage later.

    Args:
        path: Of the file.
        tensors: On any device.
        metadata: Kept beside them.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, {**metadata, _DIGEST: digest([dict(metadata), tensors_digest(kept)])})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that `save_tensors` wrote, on the CPU, and their metadata.

    Raises:
        ValueError: If the file is not what was written: truncated, changed, or of something else.
        OSError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as kept:
            # Copies: what it gives is the file itself, mapped, and may change with it.
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
    """What tells the code that an import path names from an edited one: hash of the file that has it, version of its package.

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
    """What results and runs say of the software that made them."""
    packages = ("torch", "torchvision", "pytorch-lightning", "torchmetrics")
    return {
        "lightning-advknn": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
