"""Makes what is missing of an experiment's stages, for one process or for several ranks that share the work.

The files are the same whatever the number of ranks: one that several ranks make is split at batch boundaries, so that
no number changes, and put together. What is finished is kept if a rank dies.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.experiment.stages import Stages
from lightning_advknn.experiment.votes import ImitatedKNN
from lightning_advknn.ranks import Ranks
from lightning_advknn.search.scans.quantize import fastest

_TAKEN = 100  # stages that several ranks lock together; each lock is an open file
_SEEN = 10.0  # seconds that a file may take to show on another machine


class _Filler:
    """Fills the cache; every rank has one and calls the same methods in the same order.

    Args:
        stages: What to make.
        ranks: Who shares the work.
        folder: Of the cache.
    """

    def __init__(self, stages: Stages, ranks: Ranks, folder: Path) -> None:
        self.stages, self.networks, self.ranks = stages, stages.networks, ranks
        # Its own, so that the wall time of parts does not count twice.
        self.cache = StageCache(folder)

    def check_ranks(self) -> None:
        """Raise a ValueError unless all ranks see the files of one cache and round alike."""
        if self.ranks.size > 1:
            self._check_shared()
            self._check_alike()

    def train(self) -> None:
        """Train what has not been trained: each network on one rank, the votes that surrogates learn from on all."""
        self._train("backbones", self.networks.backbones, lambda name: self.networks.backbone(name))
        surrogates = tuple(self.networks.experiment.surrogates)
        self._teach(self._missing("surrogates", surrogates))
        self._train("surrogates", surrogates, lambda name: self.networks.surrogate(name))

    def make(self, what: str, stages: Iterable[Stage], bank: Judges | ImitatedKNN | None = None) -> None:
        """Make what is missing of some stages, none of which depends on another.

        Args:
            what: They are, in words; the same on all ranks.
            stages: In order.
            bank: Who has the bank that they need. All ranks build it at the same time, unless nothing is missing.
        """
        ranks, named = self.ranks, {stage.name: stage for stage in stages}
        missing = list(named)
        progress = tqdm(total=len(named), desc=what, disable=True if ranks.rank else None, leave=False)
        while missing:
            with ExitStack() as locks:  # of rank 0, for all
                find = partial(self._take, missing, named, locks)
                missing, taken = ranks.agree(f"what is missing of {what}", find)
                if taken and bank:
                    bank.prepare()
                parts = {name: named[name].parts(ranks.size) for name in taken}
                units = [(named[name], *part) for name in taken for part in parts[name]]
                for stage, part, rows in ranks.deal(units):
                    self.cache.keep(part, stage.label, partial(stage.make, rows))
                (bank.wait if bank else ranks.barrier)(what)
                for name in ranks.deal([name for name in taken if len(parts[name]) > 1]):
                    self.cache.join(name, named[name].label, [part for part, _ in parts[name]])
                ranks.barrier(f"{what}, put together")
            progress.update(len(named) - len(missing) - progress.n)
        progress.close()

    def _take(
        self, names: Sequence[str], stages: Mapping[str, Stage], locks: ExitStack
    ) -> tuple[list[str], list[str]]:
        """Lock some of what is missing and no other run makes; wait if others make it all, with no lock held.

        Two runs that waited for each other's locks, with ranks that wait at a barrier, would wait for ever.

        Returns:
            Names of what may still be missing beside what is taken, and of what is taken.
        """
        most = 1 if self.ranks.size == 1 else _TAKEN  # one process leaves the rest to other runs
        while missing := [name for name in names if not self.cache.has(name)]:
            taken: list[str] = []
            for name in missing:
                if len(taken) < most:
                    with suppress(TimeoutError):
                        lock = self.cache.lock(self.cache.path(name), stages[name].label, wait=False)
                        locks.enter_context(lock)
                        taken.append(name)
            if taken := [
                name for name in taken if not self.cache.has(name)
            ]:  # it may have been made meanwhile
                return [name for name in missing if name not in taken], taken
            locks.close()
            with self.cache.lock(self.cache.path(missing[0]), stages[missing[0]].label):
                pass
        return [], []

    def _train(self, what: str, names: Sequence[str], train: Callable[[str], object]) -> None:
        for name in self.ranks.deal(self._missing(what, names)):
            train(name)
        self.ranks.barrier(f"trained {what}")
        for name in names:
            train(name)  # or load what another rank has trained

    def _missing(self, what: str, names: Sequence[str]) -> list[str]:
        """Networks that have still to be trained, each checkpoint once; the same on all ranks."""

        def find() -> list[str]:
            missing = {self.networks.checkpoint(name): name for name in names if self.networks.missing(name)}
            return list(missing.values())

        return self.ranks.agree(f"what is missing of {what}", find)

    def _teach(self, surrogates: Sequence[str]) -> None:
        """Give surrogates the votes that they learn from; one process also trains each at once.

        So surrogates of the same kNN, one after the other, share the features of its bank.
        """
        known: ImitatedKNN | None = None
        for name in surrogates:
            imitated = ImitatedKNN(self.networks, name, self.ranks)
            if known is None or known.key != imitated.key:
                known = imitated
            stages = self.stages.votes(known)
            self.make("votes for surrogates", stages.values(), known)
            kept = {split: self.cache.read(stage.name, stage.label) for split, stage in stages.items()}
            votes = {split: tensors["votes"] for split, tensors in kept.items()}
            alone = self.ranks.size == 1
            self.networks.surrogate_module(name).teach(votes, known.features if alone else None)
            if alone:
                self.networks.surrogate(name)

    def _check_shared(self) -> None:
        ranks, folder = self.ranks, self.cache.folder

        def leave() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
            os.close(handle)
            return Path(path).name

        token = folder / ranks.agree("a file in the cache", leave)
        until = time.monotonic() + _SEEN
        while not (seen := token.is_file()) and time.monotonic() < until:
            time.sleep(0.1)
        found = ranks.gather("who sees the cache", seen)
        if ranks.rank == 0:
            token.unlink()
        if not all(found):
            blind = [rank for rank, sees in enumerate(found) if not sees]
            raise ValueError(
                f"Expected all ranks to share the files in `cache`, but {folder} of ranks {blind} is"
                " another than that of rank 0. Choose a folder on a file system that all machines share."
            )

    def _check_alike(self) -> None:
        """What one rank makes has the key by which the others look for it only if they round alike."""
        device = self.networks.device
        found = self.ranks.gather("how ranks compute", [arithmetic(device), fastest(device)])
        for rank, (numbers, precision) in enumerate(found):
            if [numbers, precision] != found[0]:
                raise ValueError(
                    f"Expected all ranks to compute alike, but rank {rank} has {numbers}, fastest in"
                    f" {precision}, and rank 0"
                    f" has {found[0][0]}, fastest in {found[0][1]}. Give a job machines of one kind."
                )


def fill(stages: Stages, ranks: Ranks, folder: Path, bounds: bool = False) -> None:
    """Make all that is missing of an experiment, every rank its share; every rank calls this.

    Args:
        stages: The experiment's.
        ranks: Who shares the work.
        folder: Of the cache.
        bounds: Also lower bounds of all attacks (`Judges.bounds`).

    Raises:
        LostRankError: If a rank has died.
        ValueError: If the ranks do not share the cache, or do not compute alike; or a stage fails.
    """
    filler = _Filler(stages, ranks, folder)
    filler.check_ranks()
    filler.train()
    there: Judges | None = None  # whose bank may be in memory
    for group in stages.groups(bounds):
        if there is not None and group.judges not in (None, there):
            there.free()
        there = group.judges or there
        filler.make(group.what, group.stages, group.judges)
    if there is not None:
        there.free()
