"""Runs that share a cache at the same time make each stage once, and one that is killed blocks none."""

import errno
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from lightning_advknn.experiment import fill
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.ranks import Ranks
from lightning_advknn.storage import locked, save_tensors
from tests.experiment.test_ranks import SERVERS

ROOT = Path(__file__).parents[2]


def keep(folder: Path, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A stage, made if it is missing, as one process does it."""
    stages: Any = SimpleNamespace(networks=None)
    fill._Filler(stages, Ranks(), folder).make("files", [Stage(name, "stage", lambda _: make())])
    return StageCache(folder).read(name, "stage")


def left(folder: Path) -> list[str]:
    """Names of locks and temporary files."""
    return [path.name for path in folder.rglob(".*")]


def test_a_lock_is_held_by_one_at_a_time_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, inside, most = tmp_path / "folder" / "file", [0], [0]

    def hold(_: int) -> float:
        with locked(path, None) as waited:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
            return waited

    with ThreadPoolExecutor(6) as pool:
        waits = list(pool.map(hold, range(18)))
    assert most == [1]
    assert min(waits) == 0
    assert max(waits) > 0.02
    assert not list(path.parent.iterdir())
    assert capsys.readouterr().err == ""


def test_what_a_killed_run_leaves_other_users_can_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "file", "it"):
        (lock,) = tmp_path.iterdir()
        assert lock.stat().st_mode & 0o777 == 0o666


def test_who_does_not_want_to_wait_need_not(tmp_path: Path) -> None:
    def take() -> None:
        with locked(tmp_path / "file", "it", wait=False):
            pass

    with ThreadPoolExecutor(1) as other:
        with locked(tmp_path / "file", "it"), pytest.raises(TimeoutError):
            other.submit(take).result()
        other.submit(take).result()


def test_a_run_that_waits_can_be_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free, held = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "file", "it"):
            held.set()
            free.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / "file", "it"):
            pass
    finally:
        free.set()
        other.join()
    assert capsys.readouterr().err == "waiting for another run that makes it\n"
    assert not left(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_runs_go_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"Expected to be able to lock files .* do the same work twice"):
        made = keep(tmp_path, "stage/file", lambda: {"x": torch.ones(1)})
    assert made["x"].item() == 1
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["file.safetensors"]


def test_waiting_counts_towards_no_stage(tmp_path: Path) -> None:
    held = threading.Event()

    def make() -> dict[str, Tensor]:
        held.set()
        time.sleep(1)
        return {"x": torch.ones(1)}

    def quick() -> dict[str, Tensor]:
        return {"x": torch.ones(1)}

    other = threading.Thread(target=keep, args=(tmp_path, "slow", make))
    other.start()
    held.wait(60)
    stages: Any = SimpleNamespace(networks=None)
    filler = fill._Filler(stages, Ranks(), tmp_path)
    listed = [Stage(name, name, lambda _: quick()) for name in ("slow", "quick")]
    filler.make("files", listed)
    other.join()
    cache = StageCache(tmp_path)
    for stage in listed:
        cache.read(stage.name, stage.label)
    assert cache.seconds()["quick"] < 0.5
    assert cache.seconds()["slow"] >= 1


def test_a_damaged_file_is_made_again_by_one_of_two(tmp_path: Path) -> None:
    made, both = [], threading.Barrier(2)

    def make() -> dict[str, Tensor]:
        made.append(1)
        time.sleep(0.3)
        return {"x": torch.full((3,), 2.0)}

    def ask(_: int) -> Tensor:
        both.wait()
        return keep(tmp_path, "file", make)["x"]

    (tmp_path / "file.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="It is made again") as said, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, range(2)))
    assert len(made) == len(said) == 1
    assert [each.tolist() for each in found] == [[2.0] * 3] * 2


def test_a_cache_that_cannot_be_written_gives_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "there.safetensors", {"x": torch.ones(1)}, {"seconds": "3"})

    def refuse(self: Path, *_: object, **__: object) -> None:  # root may write everywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    assert keep(tmp_path, "there", lambda: pytest.fail("made"))["x"].item() == 1
    with pytest.raises(OSError, match=r"Expected to be able to write in .*, but got: Read-only file system"):
        keep(tmp_path, "missing", lambda: pytest.fail("made"))


def test_jobs_of_several_ranks_and_one_process_share_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_TAKEN", 2)
    made: Counter[tuple[str, int]] = Counter()
    count = threading.Lock()

    def make(name: str, rows: range) -> dict[str, Tensor]:
        with count:
            made.update((name, row) for row in rows)
        time.sleep(0.02)
        return {"x": torch.tensor(list(rows))}

    names = [f"stage/{number}" for number in range(7)]

    def work(ranks: Ranks) -> None:
        stages: Any = SimpleNamespace(networks=None)
        listed = [Stage(name, "stage", partial(make, name), 5, 2) for name in names]
        fill._Filler(stages, ranks, tmp_path).make("files", listed[:: 1 if ranks.size > 1 else -1])

    with ThreadPoolExecutor(5) as pool:
        done = [pool.submit(work, Ranks())]
        for _ in range(2):
            server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            SERVERS.append(server)
            for rank in range(2):
                store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
                done.append(pool.submit(work, Ranks(rank, 2, rank, store, 30.0)))
        for each in done:
            each.result(60)
    assert made == dict.fromkeys(((name, row) for name in names for row in range(5)), 1)
    assert {path.name for path in (tmp_path / "stage").iterdir()} == {
        f"{number}.safetensors" for number in range(7)
    }
    for name in names:
        assert StageCache(tmp_path).read(name, "stage")["x"].tolist() == [0, 1, 2, 3, 4]


def test_filelock_takes_a_new_file_if_its_own_has_gone(tmp_path: Path) -> None:
    # What makes it safe to delete a lock's file while others have it open.
    path, taken = tmp_path / "lock", []
    first = filelock.FileLock(path, fallback_to_soft=False)

    def second() -> None:
        with filelock.FileLock(path, poll_interval=0.01, fallback_to_soft=False):
            taken.append(path.exists())

    with first, warnings.catch_warnings():
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.1)
        path.unlink()
    other.join()
    assert taken == [True]
