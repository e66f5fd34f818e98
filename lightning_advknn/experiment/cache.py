"""Results of stages on disk, and what each took."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lightning_advknn.storage import check_writable, load_tensors, locked, read_json, save_tensors, write_json

T = TypeVar("T")


class StageCache:
    """Keeps the tensors of stages, each in a file whose name holds a key of all it depends on.

    Several runs may share a folder at the same time; `lock` keeps two from making one file.

    Args:
        folder: Where.

    Raises:
        OSError: If the folder is missing and cannot be made. A folder that cannot be written can be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            check_writable(folder)
        self.folder = folder
        self._seconds: dict[str, tuple[str, float]] = {}  # by name: label and wall time
        self._waited: set[str] = set()  # labels whose wait has been announced

    def path(self, name: str) -> Path:
        """The file of a stage."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a stage's tensors are there and undamaged."""
        path = self.path(name)
        try:
            return path.is_file() and bool(load_tensors(path))
        except ValueError:
            return False

    def read(self, name: str, label: str) -> dict[str, Tensor]:
        """What is kept of a stage, on the CPU; its wall time is noted.

        Raises:
            FileNotFoundError: If it has not been made.
            ValueError: If it is damaged.
        """
        tensors, metadata = load_tensors(self.path(name))
        self.note(name, label, float(metadata["seconds"]))
        return tensors

    def keep(self, name: str, label: str, make: Callable[[], dict[str, Tensor]]) -> None:
        """Make a stage and keep it, unless it is there; whoever calls this holds its lock.

        Args:
            name: Of its file, without the suffix.
            label: What its wall time counts as.
            make: Makes its tensors.
        """
        if self.path(name).is_file():
            try:
                self.read(name, label)
                return
            except ValueError as error:
                warnings.warn(f"{error} It is made again.", stacklevel=3)
        tensors = self.measured(name, label, make)
        save_tensors(self.path(name), tensors, {"stage": label, "seconds": f"{self._seconds[name][1]:.3f}"})

    @contextmanager
    def lock(self, path: Path, label: str, wait: bool = True) -> Iterator[None]:
        """Be the only run that makes a file of a stage. A run that has to wait says so, once a label.

        Raises:
            TimeoutError: If another run makes it, and `wait` is False.
        """
        with locked(path, None if label in self._waited else label, wait) as seconds:
            if seconds:
                self._waited.add(label)
            yield

    def join(self, name: str, label: str, parts: Sequence[str]) -> None:
        """Put a stage that was made in parts into one file, and delete the parts.

        Args:
            name: Of the file.
            label: What its wall time counts as; it is the sum of the parts'.
            parts: Names of the parts, in order of rows.
        """
        paths = [self.path(part) for part in parts]
        loaded = [load_tensors(path) for path in paths]
        tensors = {key: torch.cat([part[key] for part, _ in loaded]) for key in loaded[0][0]}
        seconds = sum(float(metadata["seconds"]) for _, metadata in loaded)
        save_tensors(self.path(name), tensors, {"stage": label, "seconds": f"{seconds:.3f}"})
        for folder in {path.parent for path in paths}:
            shutil.rmtree(folder)

    def measured(self, name: str, label: str, make: Callable[[], T]) -> T:
        """What `make` returns, not kept; its wall time is noted."""
        started = time.perf_counter()
        result = make()
        self.note(name, label, time.perf_counter() - started)
        return result

    def built(self, name: str, label: str, make: Callable[[], T]) -> T:
        """As `measured`; the wall time is kept for runs that need not make it (`note_built`)."""
        result = self.measured(name, label, make)
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, {"seconds": self._seconds[name][1]})
        return result

    def note_built(self, name: str, label: str) -> None:
        """Note the wall time of what an earlier run has built, unless this one has."""
        path = self.folder / f"{name}.json"
        if name not in self._seconds:
            with suppress(OSError, ValueError):  # of a missing or damaged file, no time is known
                self.note(name, label, read_json(path)["seconds"])

    def note(self, name: str, label: str, seconds: float) -> None:
        """Count the wall time of something that was made, now or earlier, towards a label."""
        self._seconds[name] = label, seconds

    def seconds(self) -> dict[str, float]:
        """Wall time by label, also of stages that an earlier run made and this one read."""
        total: dict[str, float] = {}
        for label, seconds in self._seconds.values():
            total[label] = total.get(label, 0.0) + seconds
        return total

    def pieces(self) -> dict[str, tuple[str, float]]:
        """The same by name: what two experiments share has one name, and has been made once."""
        return {name: (label, round(seconds, 1)) for name, (label, seconds) in self._seconds.items()}
