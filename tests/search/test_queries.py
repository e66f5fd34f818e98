"""Forward passes whose queries are searched together."""

import pytest
import torch

from lightning_advknn.search import queries
from lightning_advknn.search.queries import together


def batches_of(sizes, device, asked=None):
    """Batches of these sizes in two layers, whose rows are numbered; `asked` notes when each is made."""
    start = 0
    for size in sizes:
        if asked is not None:
            asked.append(size)
        rows = torch.arange(start, start + size, device=device).float()[:, None]
        yield {"wide": rows.expand(-1, 3), "narrow": -rows}
        start += size


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([3, 3, 3, 2], [9, 2]),  # another batch of 3 would be more than 10
        ([5, 5], [10]),
        ([12, 1], [12, 1]),  # a batch stays whole
        ([4, 4], [8]),
        ([0], [0]),
        ([], []),
    ],
)
def test_batches_are_joined_up_to_a_size(device, monkeypatch, sizes, groups):
    monkeypatch.setattr(queries, "_TOGETHER", {"cpu": 10, "cuda": 10})
    found = list(together(batches_of(sizes, device)))
    assert [len(each["wide"]) for each in found] == groups
    rows = [row for each in found for row in each["narrow"].flatten().tolist()]
    assert rows == [-row for row in range(sum(sizes))]
    assert all(each["wide"][:, 2].tolist() == (-each["narrow"]).flatten().tolist() for each in found)


def test_wide_features_are_joined_up_to_a_share_of_the_memory(device, monkeypatch):
    monkeypatch.setattr(queries, "_TOGETHER", {"cpu": 100, "cuda": 100})
    # A quarter of the memory holds 7 images of 4 numbers of 4 bytes.
    monkeypatch.setattr(queries, "working_bytes", lambda device: 4 * 4 * 4 * 7)
    assert [len(each["wide"]) for each in together(batches_of([2] * 6, device))] == [6, 6]


def test_on_a_cpu_each_batch_is_searched_before_the_next_is_made():
    made = []
    for number, _batch in enumerate(together(batches_of([2, 2, 2], torch.device("cpu"), made)), start=1):
        assert len(made) == number
