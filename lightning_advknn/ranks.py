"""The processes (ranks) of one job of torchrun or SLURM: they wait for each other, and notice dead ones.

Ranks share a folder and a key-value store. Each writes a heartbeat to the store, so a rank that waits can
tell long work from death, and the timeout can be shorter than the work.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # exported conditionally
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_BEATS = 10  # heartbeats within a timeout
_joined = count()  # counts calls of `join`
_SHORTEST, _LONGEST = 0.0001, 0.2  # seconds between two queries of the store
_PATIENCE = 0.1  # of the time that has been waited for, until the next query


class _LostRankError(RuntimeError):
    """A rank has died or cannot be reached."""


class Ranks:
    """A rank's connection to the other ranks of its job; by default it is the only one.

    `barrier`, `agree`, `gather`, `first`, `open` and `close` are collective: every rank must call them, in
    the same order.

    Args:
        rank: Number of this process, in [0, size).
        size: Number of processes.
        local_rank: Number of this process on its machine.
        store: The shared store; None if there is no other process.
        timeout: Seconds without a heartbeat until a rank counts as dead.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        store: Store | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.rank, self.size, self.local_rank, self.timeout = rank, size, local_rank, timeout
        self._store = store
        self._met = 0
        if store is not None:
            # A separate connection, because the other may be busy.
            threading.Thread(target=self._live, args=(store.clone(),), daemon=True).start()

    def deal(self, units: Sequence[T]) -> Sequence[T]:
        """This rank's share of units of work."""
        return units[self.rank :: self.size]

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here, as long as they live.

        Args:
            what: Description of this barrier; the same on all ranks.

        Raises:
            LostRankError: If a rank has died.
            RuntimeError: If a rank is at another barrier.
        """
        if self._store is None:
            return
        self._met += 1
        keys = [f"met/{self._met}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], what)
            self._wait(keys, what)
            places = [place.decode() for place in self._store.multi_get(keys)]
        except dist.DistError as error:
            raise _LostRankError(
                f"Expected to meet the other ranks at {what!r}, but their store is gone: rank 0 or the"
                f" launcher has ended. {error}"
            ) from error
        if set(places) != {what}:
            raise RuntimeError(
                f"Expected all ranks to do the same, but they are at {places}. Give all the same command,"
                " code and files."
            )

    def agree(self, what: str, make: Callable[[], T]) -> T:
        """The result of `make` on rank 0, for all ranks; it must consist of plain values, as in JSON."""
        if self._store is None:
            return make()
        key = f"agreed/{self._met}"
        if self.rank == 0:
            self._store.set(key, json.dumps(make()))
        self.barrier(what)
        agreed: T = json.loads(self._store.get(key))
        return agreed

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all ranks, which must be plain, as in JSON."""
        if self._store is None:
            return [value]
        keys = [f"said/{self._met}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        self.barrier(what)
        return [json.loads(said) for said in self._store.multi_get(keys)]

    @contextmanager
    def first(self, what: str) -> Iterator[None]:
        """Run a block on rank 0 first, then on the others."""
        if self.rank:
            self.barrier(what)
        try:
            yield
        finally:
            if not self.rank:
                self.barrier(what)

    def open(self, what: str, device: torch.device) -> None:
        """Create the default process group of all ranks, with the same timeout: NCCL on GPUs, else gloo.

        NCCL refuses ranks that share a GPU, so these use gloo, which copies tensors of GPUs by itself. Close
        the group as soon as possible: while it exists, torchmetrics sums over all ranks, even if only one
        computes.

        Args:
            what: Description of its use; the same on all ranks.
            device: What this rank computes on.

        Raises:
            LostRankError: If a rank has died.
            ValueError: If NCCL cannot connect the GPUs.
        """
        if self._store is None:
            return
        gpus = self.gather(what, _gpu(device))
        apart = None not in gpus and len(set(gpus)) == len(gpus)
        try:
            with _noticing_dead_ranks():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if apart else "gloo",
                    store=PrefixStore(f"group/{self._met}", self._store),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=self.timeout),
                    device_id=device if apart else None,  # connect now, so that errors show here
                )
        except dist.DistBackendError as error:
            raise ValueError(
                f"Expected NCCL to connect the GPUs of {self.size} ranks, but: {error} NCCL_DEBUG=INFO shows"
                " why; one process on one GPU needs no NCCL."
            ) from error
        self.barrier(f"{what}: connected")  # no rank may disconnect before

    def close(self) -> None:
        """Destroy the process group once no rank needs it."""
        if self._store is None:
            return
        self.barrier("the end of a process group")
        dist.destroy_process_group()

    @contextmanager
    def group(self, what: str, device: torch.device) -> Iterator[None]:
        """Call `open` and, unless there is an error, `close`."""
        self.open(what, device)
        yield
        self.close()

    def _live(self, store: Store) -> None:
        beat = 0
        while True:
            try:
                store.set(f"alive/{self.rank}", str(beat))
            except dist.DistError:
                return  # the store has ended, and with it the ranks that wait
            beat += 1
            time.sleep(self.timeout / _BEATS)

    def _wait(self, keys: Sequence[str], what: str) -> None:
        store = self._store
        if store is None:
            return
        missing, started = list(range(self.size)), time.monotonic()
        seen = dict.fromkeys(missing, (b"", started))  # last heartbeat, and its time
        while missing := [rank for rank in missing if not store.check([keys[rank]])]:
            now = time.monotonic()
            for rank in missing:
                alive = f"alive/{rank}"
                beat = store.get(alive) if store.check([alive]) else b""
                if beat != seen[rank][0]:
                    seen[rank] = beat, now
                elif now - seen[rank][1] > self.timeout:
                    raise _LostRankError(
                        f"Expected rank {rank} at {what!r}, but it has shown no sign of life for"
                        f" {self.timeout:g} s: it or its network has died. Run the same command again."
                    )
            # Not `store.wait`, which warns each time that it has waited in vain.
            time.sleep(min(max((now - started) * _PATIENCE, _SHORTEST), _LONGEST))


def join(timeout: float = 300.0) -> Ranks:
    """Connect to the other ranks that torchrun or srun has started; a single process gets `Ranks()`.

    Args:
        timeout: As in `Ranks`; also the time limit for connecting.

    Raises:
        ValueError: If the timeout is not positive, or SLURM's processes cannot know of each other.
        LostRankError: If ranks cannot connect.
    """
    if not timeout > 0:
        raise ValueError(f"Expected `timeout` to be above 0 seconds, but got {timeout}.")
    kinds: tuple[type[ClusterEnvironment], ...] = TorchElasticEnvironment, SLURMEnvironment
    try:
        launcher = next((kind() for kind in kinds if kind.detect()), None)
    except RuntimeError as error:
        raise ValueError(
            f"Expected SLURM to start one process for each GPU with `--ntasks-per-node`, but: {error}"
        ) from error
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if launcher is None and tasks > 1:
        raise ValueError(
            f"Expected one process in a SLURM job called {os.environ.get('SLURM_JOB_NAME')!r}, as that name"
            f" means an interactive job, but srun has started {tasks}. Give srun another `--job-name`, or use"
            " torchrun."
        )
    if launcher is None or launcher.world_size() == 1:
        return Ranks()
    rank, size = launcher.global_rank(), launcher.world_size()
    _ = launcher.main_address, launcher.main_port  # SLURM's set the environment variables that torch reads
    try:
        store, _, _ = next(
            rendezvous(f"env://?rank={rank}&world_size={size}", timeout=timedelta(seconds=timeout))
        )
    except dist.DistError as error:
        raise _LostRankError(
            f"Expected {size} processes to find each other within {timeout:g} s, but rank {rank} did not:"
            f" {error} Check the network between them, or raise `timeout`."
        ) from error
    # Separate keys for each attempt of torchrun and each call of `join`.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    named = PrefixStore(f"lightning_advknn/{attempt}/{next(_joined)}", store)
    return Ranks(rank, size, launcher.local_rank(), named, timeout)


def _gpu(device: torch.device) -> str | None:
    """What tells a GPU from all others, on whatever machine; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


@contextmanager
def _noticing_dead_ranks() -> Iterator[None]:
    """Have a group made here raise after its timeout if a rank has died, as gloo does.

    By default NCCL kills the process instead. It reads this when the group is made.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    given = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def is_lost(error: RuntimeError) -> bool:
    """Whether an error means that a rank has died: a `_LostRankError`, or an error of the process group."""
    return isinstance(error, _LostRankError | dist.DistError) or "gloo" in str(error).lower()
