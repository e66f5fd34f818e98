"""Shards and pieces of test images, whose sizes depend on the device."""

import pytest
import torch

from lightning_advknn.data import Digits
from lightning_advknn.evaluation import GPU_BATCH
from lightning_advknn.experiment import shards
from lightning_advknn.experiment.shards import Shards

DEVICES = ("cpu", "cuda")  # images are not moved here


@pytest.fixture
def made(monkeypatch):
    """Makes shards of 12 images in pieces of 5 on a CPU, of 24 and 10 on a GPU."""
    monkeypatch.setattr(shards, "_SHARD", {"cpu": 12, "cuda": 24})
    monkeypatch.setattr(shards, "_PIECE", {"cpu": 5, "cuda": 10})
    return lambda device, n=57: Shards(Digits(), n, torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
def test_shards_and_pieces_hold_every_image_once(made, device):
    split = made(device)
    in_shards = [row for start in split.starts for row in split.positions(start)]
    in_pieces = [
        row for start in split.starts for piece in split.pieces_of(split.positions(start)) for row in piece
    ]
    assert in_shards == in_pieces == list(range(57))
    sizes = [len(piece) for piece in split.pieces_of(split.positions(split.starts[-1]))]
    assert sizes == {"cpu": [5, 4], "cuda": [9]}[device]


def test_files_of_other_sizes_have_other_names(made):
    # So that what was kept in pieces of one size is never read as one of another.
    ranges = {}
    for device in DEVICES:
        for n in (57, 31):
            split = made(device, n)
            for start in split.starts:
                rows = split.positions(start)
                ranges.setdefault(split.file(rows), set()).add(rows)
                for piece in split.pieces_of(rows):
                    ranges.setdefault(split.file(piece, piece=True), set()).add(piece)
    assert all(len(each) == 1 for each in ranges.values())


def test_a_gpus_pieces_are_whole_batches_of_its_attacks():
    assert shards._PIECE["cuda"] % GPU_BATCH == shards._SHARD["cuda"] % shards._PIECE["cuda"] == 0
    assert shards._SHARD["cpu"] % shards._PIECE["cpu"] == 0
