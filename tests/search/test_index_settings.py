"""Approximate backends: exact if they search everything, and honest about what they miss otherwise."""

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank, StoredRows, describe_index, index_settings, recall
from lightning_advknn.search.index_settings import training_rows

pytest.importorskip("faiss")

EVERYWHERE = [("ivf", {"nlist": 6, "nprobe": 6}), ("hnsw", {"M": 16, "efSearch": 300})]


def brute_force(queries, features, metric, k, own=None):
    """Rows of the k nearest in float64, ties by row; `own` are ids, equal to rows' ids, that do not count."""
    q, x = queries.double().numpy(), features.double().numpy()
    if metric == "cosine":
        q, x = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (q, x))
    distances = ((q[:, None] - x) ** 2).sum(2).round(12)
    if own is not None:
        distances[own] = np.inf
    return distances.argsort(axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("backend", "index"), EVERYWHERE)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("disk", [False, True])
def test_who_looks_everywhere_finds_all(tmp_path, backend, index, metric, disk):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 12, generator=generator)
    queries = torch.randn(40, 12, generator=generator)
    labels, ids = torch.arange(300) % 7, torch.arange(300) // 3  # three rows an image
    features = rows
    if disk:
        features = StoredRows(12, torch.float32, tmp_path, torch.device("cpu"))
        features.append(rows)
    bank = MemoryBank(features, labels, ids, 7, metric, backend, index)
    expected = brute_force(queries, rows, metric, 9)
    assert bank.search(queries, 9)[1].tolist() == expected.tolist()
    votes = [[(row == label).sum() for label in range(7)] for row in labels.numpy()[expected]]
    assert bank.votes(queries, 9).tolist() == votes
    assert recall(bank, queries, 9).tolist() == [1.0] * 40
    others = brute_force(rows, rows, metric, 9, (ids[:, None] == ids).numpy())
    votes = [[(row == label).sum() for label in range(7)] for row in labels.numpy()[others]]
    assert bank.leave_one_out_votes(9).tolist() == votes


def line(index, backend="ivf"):
    """40 rows of class 0 on a line at 0, -.3, ..., 40 of class 1 at 10, 10.3, ...: two lists."""
    place = torch.cat([-0.3 * torch.arange(40), 10 + 0.3 * torch.arange(40)])[:, None]
    return MemoryBank(place, torch.arange(80) // 40, torch.arange(80), 2, "euclidean", backend, index)


def test_recall_by_hand():
    queries = torch.tensor([[4.9], [-3.1], [5.2]])
    bank = line({"nlist": 2, "nprobe": 1})
    # Nearest to 4.9 are 0, -.3, 10 and 10.3, two of them in its list; to 5.2 10, 10.3, 0 and 10.6, three of
    # them.
    assert recall(bank, queries, 4).tolist() == [0.5, 1.0, 0.75]
    assert bank.search(queries[:1], 4)[1].tolist() == [[0, 1, 2, 3]]
    assert bank.votes(queries, 4).tolist() == [[4, 0], [4, 0], [0, 4]]
    both = line({"nlist": 2, "nprobe": 2})
    assert recall(both, queries, 4).tolist() == [1.0, 1.0, 1.0]
    assert both.votes(queries, 4).tolist() == [[2, 2], [4, 0], [1, 3]]
    assert recall(line(None, "float32"), queries, 4).tolist() == [1.0, 1.0, 1.0]


def test_too_few_rows_in_the_lists_are_made_up_for_exactly():
    bank = line({"nlist": 2, "nprobe": 1})
    queries = torch.tensor([[4.9], [5.2]])
    # 40 rows a list: less than the candidates of k = 30.
    assert (
        bank.search(queries, 30)[1].tolist() == brute_force(queries, bank.features, "euclidean", 30).tolist()
    )


def test_own_rows_are_not_among_those_found():
    bank = line({"nlist": 2, "nprobe": 1})
    queries = bank.features[:3]  # at 0, -.3, -.6
    found = bank.search(queries, 2, torch.arange(3))[1]
    assert [sorted(row) for row in found.tolist()] == [[1, 2], [0, 2], [1, 3]]


def test_banks_of_a_class_need_no_index():
    part, rows = line({"nlist": 80, "nprobe": 1}).of_class(1)
    assert (part.backend, len(part), rows[0]) == ("auto", 40, 40)


def test_settings_by_default():
    assert index_settings("ivf", 1_000_000) == {"nlist": 1000, "nprobe": 31}
    assert index_settings("ivf", 10_000) == {"nlist": 100, "nprobe": 8}
    assert index_settings("ivf", 9) == {"nlist": 3, "nprobe": 3}
    assert index_settings("ivf", 9, {"nlist": 5}) == {"nlist": 5, "nprobe": 5}
    assert index_settings("hnsw", 9, {"M": 4}) == {"M": 4, "efSearch": 256}
    assert index_settings("auto", 9) == {}
    assert describe_index("float32", 9, None) is None
    assert describe_index("ivf", 9, {"nprobe": 2}) == {"backend": "ivf", "nlist": 3, "nprobe": 2}


@pytest.mark.parametrize(
    ("backend", "index", "message"),
    [
        ("ivf", {"nlists": 5}, r"among \['nlist', 'nprobe'\], but got 'nlists'"),
        ("auto", {"nlist": 5}, r"`index` of `backend='auto'` to have names among \[\]"),
        ("ivf", {"nlist": 81}, r"`index\.nlist` to be in \[1, 80\], but got 81"),
        ("ivf", {"nlist": 4, "nprobe": 5}, r"`index\.nprobe` to be in \[1, 4\], but got 5"),
        ("ivf", {"nprobe": 2.5}, r"`index\.nprobe` to be a whole number, but got 2\.5"),
        ("ivf", {"nprobe": True}, r"`index\.nprobe` to be a whole number, but got True"),
        ("hnsw", {"M": 1}, r"`index\.M` to be in \[2, 512\], but got 1"),
        ("hnsw", {"efSearch": 0}, r"`index\.efSearch` to be in \[1, "),
    ],
)
def test_settings_out_of_range_are_refused(backend, index, message):
    with pytest.raises(ValueError, match=message):
        line(index, backend)


def test_an_index_learns_from_no_fewer_rows_than_it_has_lists():
    assert training_rows(100_000, 65536, {"nlist": 5000}) == 5000
    assert training_rows(100_000, 65536, {"nlist": 500}) == 1024  # 2 ** 26 numbers
    assert training_rows(100_000, 64, {"nlist": 500}) == 32000
    assert training_rows(100_000, 64, {"M": 32}) == 65536
    assert training_rows(300, 64, {"nlist": 300}) == 300
