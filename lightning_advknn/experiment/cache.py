"""Results of stages on disk, and what each took."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lightning_advknn.storage import check_writable, load_tensors, locked, save_tensors

T = TypeVar("T")


class StageCache:
    """Keeps the tensors of stages, each in a file whose name holds a key of all it depends on.

    Several runs may share it at the same time: what one makes, the others wait for. One that cannot be
    written gives what it has.

    Args:
        folder: Where.

    Raises:
        OSError: If it is not there and cannot be made; later, before something is made that cannot be kept.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            check_writable(folder)
        self.folder = folder
        self._seconds: dict[str, tuple[str, float]] = {}  # by name: its stage and own wall time
        self._nested = 0.0  # wall time of stages that ran inside the one that is running
        self._waited: set[str] = set()  # stages of which was said that another run makes them

    def tensors(self, name: str, stage: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of a stage, on the CPU, made if they are not there; waited for if another run makes them.

        Args:
            name: Of the file, without its suffix.
            stage: What its wall time counts as.
            make: Makes them.
        """
        path = self.path(name)
        with suppress(ValueError):  # damaged, but another run may be making it again
            if path.is_file():
                return self.read(name, stage)
        with self.lock(path, stage):
            return self.alone(name, stage, make)

    def alone(self, name: str, stage: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same where no other run makes them, as this one has the lock."""
        path = self.path(name)
        if path.is_file():
            try:
                return self.read(name, stage)
            except ValueError as error:
                warnings.warn(f"{error} It is made again.", stacklevel=3)
        tensors = {key: tensor.cpu() for key, tensor in self.measured(name, stage, make).items()}
        save_tensors(path, tensors, {"stage": stage, "seconds": f"{self._seconds[name][1]:.3f}"})
        return tensors

    @contextmanager
    def lock(self, path: Path, stage: str, wait: bool = True) -> Iterator[None]:
        """Be the only run that makes a file of a stage. Who waits for one says so, once a stage.

        What is made meanwhile may take the locks of what it depends on, and no others, so that no two runs
        wait for each other.

        Raises:
            TimeoutError: Without `wait`, if another run makes it.
        """
        with locked(path, None if stage in self._waited else stage, wait) as seconds:
            if seconds:
                self._waited.add(stage)
                self._nested += seconds
            yield

    def read(self, name: str, stage: str) -> dict[str, Tensor]:
        """What is kept of a stage, on the CPU; its wall time is noted.

        Raises:
            FileNotFoundError: If it has not been made.
            ValueError: If it is damaged.
        """
        tensors, metadata = load_tensors(self.path(name))
        self.note(name, stage, float(metadata["seconds"]))
        return tensors

    def path(self, name: str) -> Path:
        """Of a stage's file."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a stage's tensors are there and undamaged."""
        path = self.path(name)
        try:
            return path.is_file() and bool(load_tensors(path))
        except ValueError:
            return False

    def join(self, name: str, stage: str, parts: Sequence[str]) -> None:
        """Put tensors of a stage that were made in parts into one file, and delete the parts.

        Args:
            name: Of the file.
            stage: As in `tensors`; its wall time is the sum of the parts'.
            parts: Names of theirs, in order of rows.
        """
        paths = [self.path(part) for part in parts]
        loaded = [load_tensors(path) for path in paths]
        tensors = {key: torch.cat([part[key] for part, _ in loaded]) for key in loaded[0][0]}
        seconds = sum(float(metadata["seconds"]) for _, metadata in loaded)
        metadata = {"stage": stage, "seconds": f"{seconds:.3f}"}
        save_tensors(self.path(name), tensors, metadata)
        for folder in {path.parent for path in paths}:
            shutil.rmtree(folder)

    def measured(self, name: str, stage: str, make: Callable[[], T]) -> T:
        """What `make` returns, not kept; its wall time is noted, without that of stages it had to wait for."""
        outer, self._nested = self._nested, 0.0
        started = time.perf_counter()
        result = make()
        elapsed = time.perf_counter() - started
        self.note(name, stage, elapsed - self._nested)
        self._nested = outer + elapsed
        return result

    def note(self, name: str, stage: str, seconds: float) -> None:
        """Count the wall time of something that was made, now or earlier, towards a stage."""
        self._seconds[name] = stage, seconds

    def seconds(self) -> dict[str, float]:
        """Wall time by stage, also of stages that an earlier run made and this one read."""
        return total_seconds(self._seconds)

    def pieces(self) -> dict[str, tuple[str, float]]:
        """The same by name: what two experiments share has one name, and has been made once."""
        return {name: (stage, round(seconds, 1)) for name, (stage, seconds) in self._seconds.items()}


def total_seconds(pieces: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    """Wall time by stage of pieces by name, each a stage and its wall time."""
    total: dict[str, float] = {}
    for stage, seconds in pieces.values():
        total[stage] = total.get(stage, 0.0) + seconds
    return total
