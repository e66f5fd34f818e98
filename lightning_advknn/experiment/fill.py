"""An experiment's stages shared out among ranks: each makes files that all then find in the cache, as if one had made them all.

Files are those of one process; one that several ranks make is made in parts, along borders at which nothing changes, and put
together. So rows and metrics are the same whatever the number of ranks, and what is finished is kept if one dies.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_advknn.evaluation import CPU_BATCH, GPU_BATCH
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.judges import Victims
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, VICTIMS
from lightning_advknn.experiment.training import is_trained
from lightning_advknn.modules.surrogate import VOTES, SurrogateModule
from lightning_advknn.search import fastest

_TAKEN = 100  # files that a job locks together, each of which is open meanwhile
_SEEN = 10.0  # seconds that a file may take to show on another machine


def spread(run: ExperimentRun, bounds: bool = False) -> bool:
    """Do all the long work of an experiment, each rank its share; every rank calls this. One process alone does nothing here.

    Args:
        run: With its ranks.
        bounds: Also `ExperimentRun.bounds`.

    Returns:
        Whether this rank is the one that writes results. The others are done when it has freed the victims.

    Raises:
        LostRankError: If a rank has died.
        ValueError: If the ranks do not share the cache, or do not compute alike.
    """
    if run.ranks.size == 1:
        return True
    _check_shared(run)
    _check_alike(run)
    _train(run)
    attacked = run.attacked
    _observe(run, attacked, [(ORIGIN, None)])
    attacks = [(method, attack) for method, attack in run.attacks if attack]
    _make(run, attacked, "attacks", _adversarial(run, attacks))
    _observe(run, attacked, attacks)
    if bounds:
        _make(run, attacked, "bounds", _bounds(run))
    for name, victims in run.transfers.items():
        attacked.free()
        _observe(run, victims, [(ORIGIN, None), *attacks], f" of {name}")
        victims.free()
    _ = attacked.dknn  # for pictures, which rank 0 makes alone
    if run.ranks.rank:
        attacked.free()
    return run.ranks.rank == 0


def _check_shared(run: ExperimentRun) -> None:
    """Raise unless all ranks see the files of one cache."""
    folder = run.cache.folder

    def leave() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
        os.close(handle)
        return Path(path).name

    token = folder / run.ranks.agree("a file in the cache", leave)
    until = time.monotonic() + _SEEN
    while not (seen := token.is_file()) and time.monotonic() < until:
        time.sleep(0.1)
    found = run.ranks.gather("who sees the cache", seen)
    if run.ranks.rank == 0:
        token.unlink()
    if not all(found):
        blind = [rank for rank, sees in enumerate(found) if not sees]
        raise ValueError(
            f"Expected all ranks to share the files in `cache`, but {folder} of ranks {blind} is another than that of rank 0. Choose"
            " a folder on a file system that all machines share."
        )


def _check_alike(run: ExperimentRun) -> None:
    """Raise unless all ranks round alike, so that what one makes has the key by which the others look for it."""
    found = run.ranks.gather("how ranks compute", [arithmetic(run.device), fastest(run.device)])
    for rank, (numbers, precision) in enumerate(found):
        if [numbers, precision] != found[0]:
            raise ValueError(
                f"Expected all ranks to compute alike, but rank {rank} has {numbers}, fastest in {precision}, and rank 0 has {found[0][0]},"
                f" fastest in {found[0][1]}. Give a job machines of one kind."
            )


@dataclass(frozen=True)
class _File:
    """Something to keep.

    Args:
        name: Of the file.
        stage: What its wall time counts as.
        make: Makes some of its rows.
        n: Number of its rows.
        step: Rows that are made together.
    """

    name: str
    stage: str
    make: Callable[[range], dict[str, Tensor]]
    n: int = 1
    step: int = 1

    def parts(self, most: int) -> list[tuple[str, range]]:
        """Names and rows of up to so many parts; a single one is the file itself."""
        size = -(-self.n // (most * self.step)) * self.step
        rows = [range(first, min(first + size, self.n)) for first in range(0, self.n, size)]
        if len(rows) == 1:
            return [(self.name, rows[0])]
        return [(f"{self.name}.parts/{part.start:06d}-{part.stop:06d}", part) for part in rows]


def _make(run: ExperimentRun, victims: Victims, what: str, files: Iterable[_File]) -> None:
    """Make what is missing of these files."""
    ranks, named = run.ranks, {file.name: file for file in files}
    cache = StageCache(run.cache.folder)  # so that the wall time of parts does not count twice
    missing = list(named)
    while missing:
        with ExitStack() as locks:  # of rank 0, for all
            find = partial(_take, cache, missing, named, locks)
            missing, taken = ranks.agree(f"what is missing of {what}", find)
            parts = {name: named[name].parts(ranks.size) for name in taken}
            units = [(named[name], *part) for name in taken for part in parts[name]]
            for file, part, rows in ranks.deal(units):
                cache.alone(part, file.stage, partial(file.make, rows))
            victims.wait(what)
            for name in ranks.deal([name for name in taken if len(parts[name]) > 1]):
                cache.join(name, named[name].stage, [part for part, _ in parts[name]])
            ranks.barrier(f"{what}, put together")


def _take(
    cache: StageCache, names: Sequence[str], files: Mapping[str, _File], locks: ExitStack
) -> tuple[list[str], list[str]]:
    """Take some of what is missing and no other run makes; wait if others make all of it, but never with a lock in hand.

    Two jobs that waited for each other's locks, with ranks that wait at a barrier, would wait for ever.

    Returns:
        Names of what may be missing beside what is taken, and of what is taken.
    """
    while missing := [name for name in names if not cache.has(name)]:
        taken: list[str] = []
        for name in missing:
            if len(taken) < _TAKEN:
                with suppress(TimeoutError):
                    locks.enter_context(cache.lock(cache.path(name), files[name].stage, wait=False))
                    taken.append(name)
        if taken := [name for name in taken if not cache.has(name)]:  # which may have been made meanwhile
            return [name for name in missing if name not in taken], taken
        locks.close()
        with cache.lock(cache.path(missing[0]), files[missing[0]].stage):
            pass
    return [], []


def _train(run: ExperimentRun) -> None:
    """Train what has not been trained, each network by one rank; the votes that surrogates learn from, by all."""
    ranks = run.ranks
    networks = (run.attacked, *run.transfers.values())
    backbones = {each.checkpoint: each for each in networks if not each.trained.checkpoint}
    for path in ranks.deal(_missing(run, "backbones", backbones)):
        _ = backbones[path].network
    ranks.barrier("trained backbones")
    own = [name for name, trained in run.experiment.surrogates.items() if not trained.checkpoint]
    surrogates = {run.untrained(name)[1]: name for name in own}
    missing = _missing(run, "surrogates", surrogates)
    modules = [run.untrained(surrogates[path])[0] for path in missing]
    for module in {module.votes_file: module for module in modules}.values():
        with ExitStack() as lock:  # of rank 0, for all
            ranks.agree("who computes votes", partial(_lock_votes, run.cache, module, lock))
            with ranks.group("votes for surrogates"):
                module.to(run.device).keep_votes(run.data)
    for path in ranks.deal(missing):
        _ = run.surrogate(surrogates[path])
    ranks.barrier("trained surrogates")
    run.train()


def _lock_votes(cache: StageCache, module: SurrogateModule, lock: ExitStack) -> None:
    if module.votes_file:
        lock.enter_context(cache.lock(module.votes_file, VOTES))


def _missing(run: ExperimentRun, what: str, checkpoints: Iterable[Path]) -> list[Path]:
    """Those that are not there, or without the facts beside them."""
    paths = list(checkpoints)

    def find() -> list[int]:
        return [place for place, path in enumerate(paths) if not is_trained(path)]

    return [paths[place] for place in run.ranks.agree(f"what is missing of {what}", find)]


def _observe(
    run: ExperimentRun, victims: Victims, attacks: Iterable[tuple[str, str | None]], whose: str = ""
) -> None:
    """Ask victims about test images, clean or attacked."""
    _ = victims.dknn  # made by all, whoever asks it
    files = [_File(*victims.calibration, lambda _: victims.calibrate())]
    if victims.index:
        files.append(_File(*victims.recall_file, lambda _: victims.measure_recall()))
    _make(run, victims, f"observations{whose}", [*files, *_observations(run, victims, attacks)])


def _observations(
    run: ExperimentRun, victims: Victims, attacks: Iterable[tuple[str, str | None]]
) -> Iterator[_File]:
    for method, attack in attacks:
        for start in run.starts:
            make = partial(_query, run, victims, method, attack, start)
            yield _File(
                *victims.observation(*run.asked(method, attack, start)), make, len(run.positions(start))
            )


def _query(
    run: ExperimentRun, victims: Victims, method: str, attack: str | None, start: int, rows: range
) -> dict[str, Tensor]:
    return victims.query(run.adversarial(method, attack, start), rows)


def _adversarial(run: ExperimentRun, attacks: Iterable[tuple[str, str]]) -> Iterator[_File]:
    batch = GPU_BATCH if run.device.type == "cuda" else CPU_BATCH
    for method, attack in attacks:
        for start in run.starts:
            for name, piece in run.pieces(method, attack, start):
                make = partial(_attack, run, method, attack, piece)
                # An attack on a victim makes batches of its own.
                step = len(piece) if method in VICTIMS else batch
                yield _File(name, f"attack {method}/{attack}", make, len(piece), step)


def _attack(run: ExperimentRun, method: str, attack: str, piece: range, rows: range) -> dict[str, Tensor]:
    return run.attack(method, attack, piece[rows.start : rows.stop])


def _bounds(run: ExperimentRun) -> Iterator[_File]:
    for layer, scale in run.scales().items():
        for piece in run.bound_pieces():
            yield _File(*run.bound_file(layer, piece), partial(_bound, run, layer, scale, piece))


def _bound(run: ExperimentRun, layer: str, scale: Tensor, piece: range, _: range) -> dict[str, Tensor]:
    images, labels, _ids = run.images(piece)
    return run.attacked.bounds(layer, scale, images, labels)
