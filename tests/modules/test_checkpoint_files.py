"""Checkpoint files: code in them does not run, damaged ones are refused, and writing is atomic."""

import errno
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer

from lightning_advknn.data import Digits
from lightning_advknn.modules import BackboneModule
from lightning_advknn.modules.checkpoint import IDENTITY, AtomicCheckpointIO, read_checkpoint
from tests.modules.checkpoints import load, put, rewrite


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("place", ["state_dict", IDENTITY, "hyper_parameters", "extra"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    backbone: BackboneModule, backbone_checkpoint: Path, tmp_path: Path, place: str, zipped: bool
) -> None:
    target, path = tmp_path / "it ran", tmp_path / "bomb.ckpt"
    checkpoint = torch.load(backbone_checkpoint, weights_only=True)
    checkpoint[place] = Bomb(target)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bomb\.ckpt.*would run code.*a source you trust"):
        load(backbone, path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # it does run here
    assert target.exists()


def test_a_bare_pickle_is_refused_and_does_not_run(
    backbone: BackboneModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # With this variable, torch.load runs code unless `weights_only` is given.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, path = tmp_path / "it ran", tmp_path / "bomb.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(target)}, protocol=2))
    with pytest.raises(ValueError, match=r"would run code"):
        load(backbone, path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()


def test_a_trainer_given_code_as_ckpt_path_does_not_run_it(
    backbone: BackboneModule, make_trainer: Callable[..., Trainer], backbone_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "it ran"
    path = rewrite(backbone_checkpoint, tmp_path / "bomb.ckpt", put(Bomb(target), "extra"))
    with pytest.raises(pickle.UnpicklingError):
        make_trainer().validate(backbone, datamodule=Digits(val_size=850), ckpt_path=path)
    assert not target.exists()


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_file_is_refused(
    backbone: BackboneModule, backbone_checkpoint: Path, tmp_path: Path, part: float
) -> None:
    content = backbone_checkpoint.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"Expected .*cut\.ckpt"):
        load(backbone, path)


def test_every_flipped_number_is_found(tmp_path: Path) -> None:
    # Each byte of each tensor; torch.load itself notices none.
    path = tmp_path / "flipped.ckpt"
    torch.save({"state_dict": {"a": torch.arange(64.0), "b": torch.ones(3, dtype=torch.int64)}}, path)
    whole = bytearray(path.read_bytes())
    for tensor in (torch.arange(64.0), torch.ones(3, dtype=torch.int64)):
        content = tensor.numpy().tobytes()
        start = whole.index(content)
        for position in range(start, start + len(content)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            assert not torch.equal(
                torch.cat([v.double() for v in torch.load(path)["state_dict"].values()]),
                torch.cat([torch.arange(64.0).double(), torch.ones(3).double()]),
            )
            with pytest.raises(ValueError, match=r"Expected .*flipped\.ckpt to be as it was written"):
                read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path)["state_dict"]["a"][63] == 63


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello, no checkpoint\n",
        b"seed_everything: 0\nmodel:\n",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04" + b"\x00" * 100,
        b"\x80\x02.",
        pickle.dumps([1, 2, 3], 2),
    ],
    ids=["empty", "newline", "text", "yaml", "image", "zip", "pickle", "list"],
)
def test_what_is_no_checkpoint_is_refused(backbone: BackboneModule, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*odd\.ckpt"):
        load(backbone, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of random bytes
def test_random_and_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "noise.ckpt"
    refused = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        content = {"state_dict": {"a": torch.ones(3)}, "x": [1]}
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        for _ in range(100):
            damaged = bytearray(buffer.getvalue())
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            cut = rng.integers(1, len(damaged))
            for noise in (damaged, damaged[:cut], rng.bytes(rng.choice([1, 8, 300]))):
                path.write_bytes(noise)
                try:
                    read_checkpoint(path)  # damage to values may stay unnoticed
                except ValueError as error:
                    refused.append(str(error))
    assert len(refused) > 300
    assert all(str(path) in message for message in refused)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_file_is_refused_with_the_way_to_make_one(
    backbone: BackboneModule, tmp_path: Path, kind: str
) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "none.ckpt"
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))}.*train\.py fit"):
        load(backbone, path)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"epoch": 1}, path)

    def half(self: Path, content: Any) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            writer.save_checkpoint({"epoch": 2}, path)
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_places_that_are_no_paths_are_left_to_lightning() -> None:
    fsspec.filesystem("memory").rm("/", recursive=True)
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, "memory://folder/last.ckpt")
    assert fsspec.filesystem("memory").exists("/folder/last.ckpt")
