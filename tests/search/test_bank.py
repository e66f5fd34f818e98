"""Search and votes against brute force in float64 and in exact fractions, for both metrics and backends."""

from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_advknn.search import MemoryBank
from lightning_advknn.search.scans import faiss_scan as faiss_backend
from lightning_advknn.search.scans import quantize as codes
from lightning_advknn.search.scans import self_scan as symmetric
from lightning_advknn.search.scans import similarities as exact
from lightning_advknn.search.scans import torch_scan as scan
from lightning_advknn.search.scans.candidates import Candidates
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.stored_rows import StoredRows

METRICS = ("cosine", "euclidean")
PRECISIONS = ("int8", "bfloat16", "float32")
BACKENDS = (
    *PRECISIONS,
    pytest.param("faiss", marks=pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")),
)

both_metrics = pytest.mark.parametrize("metric", METRICS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_precision = pytest.mark.parametrize("backend", PRECISIONS)


def make_bank(features, metric, backend="auto", device="cpu", num_classes=5, ids=None):
    labels = torch.from_numpy(np.random.default_rng(0).integers(num_classes, size=len(features)))
    ids = torch.arange(len(features)) if ids is None else ids
    return MemoryBank(features, labels, ids, num_classes, metric, backend).to(device)


def true_distances(queries, features, metric):
    """Float64 ``(B, M)``; cosine distances to 12 decimals, as the bank's contract says."""
    q, x = queries.double().numpy(), features.double().numpy()
    if metric == "euclidean":
        return np.stack([np.sqrt(((row - x) ** 2).sum(1)) for row in q])
    lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    similarities = np.divide(q @ x.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return 1 - similarities.round(12)


def brute_force(queries, features, metric, k, own=None):
    """Distances and rows of the k nearest, ties by bank row; `own` holds the row each query may not use."""
    distances = true_distances(queries, features, metric)
    if own is not None:
        distances[np.arange(len(own)), own] = np.inf
    rows = distances.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, 1), rows


def exact_rows(queries, features, metric, k):
    """The k nearest rows in exact rational arithmetic, for integer features."""
    rows = [tuple(x) for x in features.int().tolist()]
    result = []
    for q in queries.int().tolist():
        keys = {}
        for x in set(rows):
            if metric == "euclidean":
                keys[x] = sum((a - b) ** 2 for a, b in zip(q, x, strict=True))
            else:  # cos grows as sign(q.x) (q.x)^2 / |x|^2 does
                dot, square = sum(a * b for a, b in zip(q, x, strict=True)), sum(b * b for b in x)
                keys[x] = -Fraction(dot * abs(dot), square) if square else Fraction(0)
        rank = {key: place for place, key in enumerate(sorted(set(keys.values())))}
        result.append(sorted(range(len(rows)), key=lambda row: (rank[keys[rows[row]]], row))[:k])
    return result


def check(bank, queries, k, distances, rows, own_ids=None):
    """Assert that search and votes give these neighbours."""
    device = bank.features.device
    queries = queries.to(device)
    found_distances, found_rows = bank.search(queries, k, own_ids)
    assert found_distances.dtype == torch.float64
    assert found_rows.dtype == torch.int64
    assert found_rows.tolist() == np.asarray(rows).tolist()
    np.testing.assert_allclose(found_distances.cpu(), distances, rtol=1e-12, atol=2e-12)
    labels = bank.labels.cpu().numpy()[np.asarray(rows)]
    expected = [[(row == label).sum() for label in range(bank.num_classes)] for row in labels]
    assert bank.votes(queries, k, own_ids).tolist() == np.asarray(expected).tolist()


@contextmanager
def scans_of(bank):
    """The numbers of candidates and queries that each scan was asked for."""
    asked = []
    with replaced_scan(bank, lambda scan, queries, n: asked.append((n, len(queries))) or scan(queries, n)):
        yield asked


@contextmanager
def replaced_scan(bank, function):
    """Let ``function(scan, queries, n)`` answer for the bank's scan."""
    scan = bank._scanner()

    class Replacement:
        precision, device = scan.precision, scan.device

        def __call__(self, queries, n):
            return function(scan, queries, n)

    bank._scan = Replacement()
    yield
    bank._scan = scan


@each_backend
@both_metrics
@pytest.mark.parametrize(
    ("rows", "width", "k"), [(1, 3, 1), (40, 2, 40), (300, 17, 5), (900, 64, 75), (2000, 5, 1)]
)
def test_random_features(device, metric, backend, rows, width, k):
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator)
    queries = torch.randn(30, width, generator=generator)
    check(
        make_bank(features, metric, backend, device), queries, k, *brute_force(queries, features, metric, k)
    )


@each_backend
@both_metrics
def test_rectified_features_with_zero_vectors(device, metric, backend):
    # As after a ReLU; a zero vector is at cosine distance 1 from everything, also from another zero vector.
    generator = torch.Generator().manual_seed(1)
    features = (torch.randn(400, 6, generator=generator) - 0.5).relu()
    queries = (torch.randn(60, 6, generator=generator) - 0.5).relu()
    features[7] = features[399] = queries[5] = 0
    check(
        make_bank(features, metric, backend, device), queries, 20, *brute_force(queries, features, metric, 20)
    )


def test_a_zero_query_takes_the_first_rows_by_cosine(device):
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    check(make_bank(features, "cosine", device=device), torch.zeros(1, 4), 3, [[1.0, 1.0, 1.0]], [[0, 1, 2]])


@each_backend
@both_metrics
def test_many_queries_and_a_bank_scanned_in_blocks(device, metric, backend, monkeypatch):
    for name, value in (("scan._HELD", 1500), ("scan._PRODUCT", 300), ("bank._AT_ONCE", 16)):
        monkeypatch.setattr(f"lightning_advknn.search.{name}", {"cpu": value, "cuda": value})
    for name, value in (("exact.PAIR_ELEMENTS", 50), ("exact._PAIRS", 30), ("codes._ENCODE_ELEMENTS", 33)):
        monkeypatch.setattr(f"lightning_advknn.search.{name}", value)
    generator = torch.Generator().manual_seed(3)
    features, queries = torch.randn(300, 8, generator=generator), torch.randn(70, 8, generator=generator)
    check(
        make_bank(features, metric, backend, device), queries, 9, *brute_force(queries, features, metric, 9)
    )


@each_backend
@both_metrics
def test_duplicate_rows_order_by_row(device, metric, backend):
    generator = torch.Generator().manual_seed(4)
    distinct = torch.randn(15, 9, generator=generator)
    features = distinct[torch.randint(15, (300,), generator=generator)]
    queries = torch.randn(20, 9, generator=generator)
    bank = make_bank(features, metric, backend, device)
    check(bank, queries, 30, *brute_force(queries, features, metric, 30))


@both_metrics
def test_copies_tie_however_many_are_compared_at_once(device, metric):
    # So wide that 32 pairs are compared at once, and a last one alone: torch shares out a lone sum among threads.
    generator = torch.Generator().manual_seed(30)
    features = torch.rand(1, 2**16, generator=generator).expand(33, -1).contiguous()
    queries = torch.rand(6, 2**16, generator=generator)
    bank = make_bank(features, metric, "float32", device)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for query in queries.to(device):
            assert bank.search(query[None], 33)[1].tolist() == [list(range(33))]
    finally:
        torch.set_num_threads(before)


def test_rows_order_by_distance_and_not_by_its_square(device):
    # sqrt(2^52 + 1) is 2^26 in float64.
    bank = make_bank(torch.tensor([[2.0**26, 1.0], [2.0**26, 0.0]]), "euclidean", device=device)
    distances, rows = bank.search(torch.zeros(1, 2, device=device), 2)
    assert distances.tolist() == [[2.0**26, 2.0**26]]
    assert rows.tolist() == [[0, 1]]


@each_backend
def test_parallel_rows_tie_by_cosine(device, backend):
    # Multiples of one vector round differently in float32 and in float64; they must tie all the same.
    generator = torch.Generator().manual_seed(5)
    directions = torch.randint(1, 9, (4, 12), generator=generator).float()
    scales = torch.randint(1, 1000, (200, 1), generator=generator).float()
    which = torch.randint(4, (200,), generator=generator)
    features, queries = directions[which] * scales, torch.rand(10, 12, generator=generator)
    _, rows = make_bank(features, "cosine", backend, device).search(queries.to(device), 30)
    similarities = (queries.double() @ directions.double().T) / directions.double().norm(dim=1)
    for query, found in enumerate(rows.tolist()):
        rank = (-similarities[query]).argsort().argsort()  # directions by similarity: no ties among four
        assert found == sorted(range(200), key=lambda row: (rank[which[row]].item(), row))[:30]


@each_backend
@both_metrics
@pytest.mark.parametrize("k", [1, 10, 75])
def test_integer_grids_with_massive_ties_widen_the_scan(device, metric, backend, k):
    generator = torch.Generator().manual_seed(6)
    features = torch.randint(3, (9000, 3), generator=generator).float()  # 27 distinct rows
    queries = torch.randint(3, (8, 3), generator=generator).float()
    bank = make_bank(features, metric, backend, device)
    rows = exact_rows(queries, features, metric, k)
    with scans_of(bank) as asked:
        _, found = bank.search(queries.to(device), k)
    assert found.tolist() == rows
    first = (3 * k if backend in ("int8", "bfloat16") else k) + 32
    assert asked[0][0] == first
    assert len(asked) > 1, "ties beyond the margin must widen the scan"
    assert asked[1][0] == min(9000, 8 * first)
    check(
        bank,
        queries,
        k,
        np.take_along_axis(true_distances(queries, features, metric), np.array(rows), 1),
        rows,
    )


@both_metrics
def test_only_doubtful_queries_are_scanned_again(device, metric):
    # 200 copies of one row: a query beside them is in doubt, queries elsewhere are not.
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(600, 8, generator=generator)
    features[::3] = 10 * features[0]
    queries = torch.cat([features[:1], -features[:1], torch.randn(3, 8, generator=generator)])
    bank = make_bank(features, metric, device=device)
    with scans_of(bank) as asked:
        _, rows = bank.search(queries.to(device), 5)
    assert asked[0][1] == 5
    assert len(asked) > 1
    assert max(queries for _, queries in asked[1:]) < 5
    assert rows.tolist() == brute_force(queries, features, metric, 5)[1].tolist()


@each_precision
@both_metrics
def test_distinct_features_are_scanned_once(device, metric, backend):
    generator = torch.Generator().manual_seed(8)
    bank = make_bank(torch.randn(2000, 64, generator=generator), metric, backend, device=device)
    with scans_of(bank) as asked:
        bank.search(torch.randn(20, 64, generator=generator).to(device), 75)
    assert asked == [(75 + 32 if backend == "float32" else 3 * 75 + 32, 20)]


@each_backend
@both_metrics
def test_near_ties_that_float32_gets_wrong(device, metric, backend):
    # 300 rows within a few last places of one vector: their distances differ by less than 1e-7 relative.
    generator = torch.Generator().manual_seed(9)
    centre = torch.rand(64, generator=generator) + 0.5
    features = centre * (1 + 2.0**-23 * torch.randint(-2, 3, (300, 64), generator=generator))
    queries = torch.rand(12, 64, generator=generator) + 0.5
    k = 20
    distances, rows = brute_force(queries, features, metric, k)
    spread = true_distances(queries, features, metric)
    assert (np.ptp(spread, axis=1) < 1e-6 * spread.mean(1)).all()
    # A plain float32 search takes the wrong rows for every one of these queries, on this device:
    q, x = queries.to(device), features.to(device)
    if metric == "cosine":
        scores = (q / q.norm(dim=1, keepdim=True)) @ (x / x.norm(dim=1, keepdim=True)).T
    else:
        scores = 2 * q @ x.T - x.square().sum(1)
    plain = scores.topk(k).indices.sort().values.cpu().numpy()
    assert (plain != np.sort(rows)).any(1).all()
    check(make_bank(features, metric, backend, device), queries, k, distances, rows)


@each_backend
@both_metrics
def test_near_ties_are_resolved_in_float64_and_not_by_row(device, metric, backend):
    # Each row is a hair nearer than the one before, so the nearest come last in the bank.
    features = torch.ones(50, 2)
    features[:, 1] = 1 + 2.0**-23 * torch.arange(50, 0, -1)
    queries = torch.tensor([[1.0, 1.0 - 2.0**-10]])
    bank = make_bank(features, metric, backend, device)
    # By cosine the angle to (1, 1) shrinks along the rows in steps of 1e-10 and more.
    _, rows = bank.search(queries.to(device), 4)
    assert rows.tolist() == [[49, 48, 47, 46]]


@each_backend
@both_metrics
def test_leave_one_out_by_hand(device, metric, backend):
    # Points on a circle at 0, 10, 20, 30 degrees and so on: neighbours by angle, for either metric.
    #
    # query (row, id)      all rows, k = 3    without its own
    # 0 at  0 deg (id 7)   0, 1, 2            1, 2, 3
    # 2 at 20 deg (id 5)   2, 1, 4            1, 4, 3     (4 lies at 26 deg, 3 at 33)
    # a stranger at 2 deg  0, 1, 2            0, 1, 2     (id 99 is not in the bank)
    degrees = torch.tensor([0.0, 11, 20, 33, 26])
    ids = torch.tensor([7, 3, 5, 1, 8])
    features = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], 1)
    angles = torch.tensor([0.0, 20, 2]).deg2rad()
    queries = torch.stack([angles.cos(), angles.sin()], 1)
    bank = MemoryBank(features, torch.tensor([0, 1, 2, 1, 0]), ids, 3, metric, backend).to(device)
    queries, own = queries.to(device), torch.tensor([7, 5, 99], device=device)
    assert bank.search(queries, 3)[1].tolist() == [[0, 1, 2], [2, 4, 1], [0, 1, 2]]
    assert bank.search(queries, 3, own)[1].tolist() == [[1, 2, 4], [4, 1, 3], [0, 1, 2]]
    assert bank.votes(queries, 3, own).tolist() == [[1, 1, 1], [1, 2, 0], [1, 1, 1]]


@each_backend
@both_metrics
@pytest.mark.parametrize("kind", ["random", "clusters", "grid", "copies", "zeros", "all the rest"])
def test_leave_one_out_of_every_row(device, metric, backend, kind, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.scans.torch_scan._WIDE", 1)
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("lightning_advknn.search.scans.self_scan._SAMPLE", 60)
    generator = torch.Generator().manual_seed(10)
    rows, k = (60, 59) if kind == "all the rest" else (250, 12)
    features = torch.randn(rows, 6, generator=generator)
    if kind == "clusters":
        features = features.repeat(3, 1) + 0.05 * torch.randn(3 * rows, 6, generator=generator)
        rows *= 3
    if kind == "grid":
        features = torch.randint(1, 3, (rows, 3), generator=generator).float()
    if kind == "copies":  # more of them than a row may have candidates
        features[50:] = features[0]
    if kind == "zeros":  # at distance 1 from all; with neighbours on either side
        features[::5] = 0
        features[1::2] *= -1
    ids = torch.randperm(1000, generator=generator)[:rows]
    bank = make_bank(features, metric, backend, device, ids=ids)
    expected = brute_force(features, features, metric, k, own=np.arange(rows))
    check(bank, features, k, *expected, own_ids=ids.to(device))
    assert torch.equal(bank.leave_one_out_votes(k), bank.votes(bank.features, k, bank.ids))


@each_precision
@pytest.mark.parametrize("wrong", [0.0, 2.0])
def test_leave_one_out_by_any_threshold(device, backend, wrong, monkeypatch):
    """A sample that misleads: thresholds that nothing, or everything, exceeds."""
    monkeypatch.setattr("lightning_advknn.search.scans.torch_scan._WIDE", 1)
    monkeypatch.setattr("lightning_advknn.search.bank._AT_ONCE", {"cpu": 64, "cuda": 64})
    for name, value in (("_SPARE", wrong * 100), ("_SAMPLE", 100), ("_MOST", 2)):
        monkeypatch.setattr(f"lightning_advknn.search.scans.self_scan.{name}", value)
    generator = torch.Generator().manual_seed(27)
    features = torch.randn(40, 9, generator=generator).repeat(10, 1)
    features += 0.3 * torch.randn(400, 9, generator=generator)
    bank = make_bank(features, "cosine", backend, device)
    rows = brute_force(features, features, "cosine", 7, own=np.arange(400))[1]
    labels = bank.labels.cpu()[torch.from_numpy(rows)]
    expected = [row.bincount(minlength=5).tolist() for row in labels]
    assert bank.leave_one_out_votes(7).tolist() == expected


def test_pairs_of_leave_one_out_have_bounds_that_hold(device, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.scans.self_scan._SAMPLE", 100)
    features = (torch.randn(500, 64, generator=torch.Generator().manual_seed(28)) + 0.3).relu()
    bank = make_bank(features, "cosine", "int8", device)
    true = true_similarities(features, features, "cosine")
    start = 0
    for found in symmetric.candidates_of_all(bank._scanner(), bank.norms, 40, 128):
        of_step = true[start : start + 128]
        real = (found.upper > -torch.inf).cpu()
        of_found = of_step.gather(1, found.indices.cpu())
        assert (found.lower.cpu() <= of_found)[real].all()
        assert (of_found <= found.upper.cpu())[real].all()
        unseen = of_step.scatter(
            1, found.indices.cpu(), -torch.inf
        )  # padding points at row 0, a candidate or not
        unseen[:, 0] = -torch.inf
        assert (unseen <= found.unseen.cpu()).all()
        assert 20 < real.sum(1).float().mean() < 120
        assert all(
            len(set(row[there])) == there.sum()
            for row, there in zip(found.indices.cpu().numpy(), real.numpy(), strict=True)
        )
        start += 128
    assert start >= 500


@both_metrics
def test_a_row_votes_for_itself_unless_left_out(device, metric):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(11))
    bank = make_bank(features, metric, device=device)
    own = torch.arange(50)
    assert bank.search(features.to(device), 1)[1].flatten().tolist() == own.tolist()
    assert not (bank.search(features.to(device), 49, own.to(device))[1].cpu() == own[:, None]).any()


@both_metrics
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_at_any_matmul_precision(device, metric, precision):
    generator = torch.Generator().manual_seed(12)
    features, queries = torch.randn(1200, 128, generator=generator), torch.randn(40, 128, generator=generator)
    bank = make_bank(features, metric, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(bank, queries, 25, *brute_force(queries, features, metric, 25))
    finally:
        torch.set_float32_matmul_precision(before)


@both_metrics
def test_exact_under_autocast(device, metric):
    generator = torch.Generator().manual_seed(13)
    features, queries = torch.randn(1200, 128, generator=generator), torch.randn(40, 128, generator=generator)
    bank = make_bank(features, metric, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check(bank, queries, 25, *brute_force(queries, features, metric, 25))


@each_backend
@both_metrics
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e25])
@pytest.mark.parametrize("scaled", ["bank", "queries", "both", "half of the bank"])
def test_exact_at_any_scale(device, metric, backend, scale, scaled):
    generator = torch.Generator().manual_seed(14)
    features, queries = torch.randn(300, 24, generator=generator), torch.randn(10, 24, generator=generator)
    if scaled in ("queries", "both"):
        queries = queries * scale
    if scaled in ("bank", "both"):
        features = features * scale
    if scaled == "half of the bank":
        features[::2] *= scale
    distances, rows = brute_force(queries, features, metric, 15)
    bank = make_bank(features, metric, backend, device)
    found_distances, found = bank.search(queries.to(device), 15)
    assert found.tolist() == rows.tolist()
    np.testing.assert_allclose(found_distances.cpu(), distances, rtol=1e-11)
    labels = bank.labels.cpu()[torch.from_numpy(rows)]
    assert bank.votes(queries.to(device), 15).tolist() == [
        row.bincount(minlength=5).tolist() for row in labels
    ]


@each_backend
@both_metrics
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_leave_one_out_at_any_scale(device, metric, backend, scale):
    features = scale * torch.randn(60, 8, generator=torch.Generator().manual_seed(17))
    bank = make_bank(features, metric, backend, device)
    rows = brute_force(features, features, metric, 9, own=np.arange(60))[1]
    own = torch.arange(60, device=device)
    assert bank.search(features.to(device), 9, own)[1].tolist() == rows.tolist()


@each_backend
@both_metrics
@pytest.mark.parametrize("rows", [2, 9])
def test_a_row_does_not_vote_for_itself_where_arithmetic_overflows(device, metric, backend, rows):
    # All but the first have one label, so that nobody need know which of them are nearest.
    features = 1e38 * torch.rand(rows, 3, generator=torch.Generator().manual_seed(29))
    labels, ids = (torch.arange(rows) > 0).long(), torch.arange(rows)
    bank = MemoryBank(features, labels, ids, 2, metric, backend).to(device)
    queries, own = features.to(device), ids.to(device)
    everyone_else = [[0, rows - 1]] + [[1, rows - 2]] * (rows - 1)
    assert bank.votes(queries, rows - 1, own).tolist() == everyone_else
    assert bank.leave_one_out_votes(rows - 1).tolist() == everyone_else


@both_metrics
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("noise", ["random", "against the order"])
def test_any_scan_within_its_bound_gives_exact_neighbours(device, metric, leave_out, noise):
    # The bank may trust a scan no further than its bound: here one that is as wrong as it says, to its own end.
    generator = torch.Generator().manual_seed(18)
    features, k = torch.randn(200, 4, generator=generator), 10
    bank = make_bank(features, metric, device=device)
    bound = 0.3

    def scan(_, queries, n):
        q, x = queries.double(), bank.features.double()
        if metric == "cosine":
            similarity = q @ x.T / x.norm(dim=1) / q.norm(dim=1, keepdim=True)
        else:
            similarity = -torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        if noise == "random":
            scores = similarity + bound * (
                2 * torch.rand(similarity.shape, generator=generator).to(similarity) - 1
            )
        else:  # the nearest come out worse than they are, the rest better
            nearest = similarity.topk(k).values[:, -1:]
            scores = similarity + torch.where(similarity >= nearest, -bound, bound)
        found = (scores + bound + 1e-9).topk(n)
        return Candidates(found.values - 2 * bound - 2e-9, found.values, found.indices, found.values[:, -1:])

    own = torch.arange(200, device=device) if leave_out else None
    expected = brute_force(features, features, metric, k, own=np.arange(200) if leave_out else None)
    with replaced_scan(bank, scan):
        check(bank, features, k, *expected, own_ids=own)


@both_metrics
def test_the_bound_allows_for_rounded_inputs_of_matmuls(metric):
    # Whether a device rounds them or not: TF32 keeps 10 bits of mantissa, bfloat16 7.
    generator = torch.Generator().manual_seed(19)
    features, queries = torch.rand(50, 64, generator=generator), torch.rand(9, 64, generator=generator)
    norms = features.double().norm(dim=1)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, mantissa in (("high", 10), ("medium", 7)):
            torch.set_float32_matmul_precision(precision)
            found = TorchScan(features, norms, metric, "float32")(queries, 50)
            # Truncate the mantissas, as the worst of such devices would.
            q, x = (
                (rows.view(torch.int32) & -(1 << 23 - mantissa)).view(torch.float32).double()
                for rows in (queries, features)
            )
            true, rounded = queries.double() @ features.double().T, q @ x.T
            size = norms * queries.double().norm(dim=1, keepdim=True) if metric == "cosine" else 0.5
            error = ((rounded - true) / size).abs().amax(1)
            bound = (found.upper - found.lower).amax(1) / 2
            assert (error <= bound).all()
            assert error.max() > bound.max() / 20, "the bound should not be far from what can happen"
    finally:
        torch.set_float32_matmul_precision(before)


def true_similarities(queries, features, metric):
    """Float64 ``(B, M)``."""
    q, x = queries.double(), features.double()
    if metric == "euclidean":
        return -torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return q @ x.T / x.norm(dim=1) / q.norm(dim=1, keepdim=True)


@each_backend
@both_metrics
@pytest.mark.parametrize("width", [1, 7, 300, 3000])
@pytest.mark.parametrize(
    "scales", [(1, 1), (1e-6, 1e3), (1e5, 1e-4), (1e-15, 1e-8), (1e9, 1e9), (1e-25, 1e-12), (1e-41, 1)]
)
@pytest.mark.parametrize("kind", ["normal", "positive", "sparse", "outlier"])
def test_bounds_hold_what_a_scan_finds_and_what_it_does_not(device, metric, backend, width, scales, kind):
    generator = torch.Generator().manual_seed(width)
    queries = torch.randn(7, width, generator=generator)
    features = torch.randn(60, width, generator=generator)
    if kind == "positive":  # no cancellation, the rounding errors add up
        queries, features = queries.abs(), features.abs()
    if kind == "sparse":
        queries, features = (queries - 1).relu(), (features - 1).relu()
        queries[:, 0] += 0.1
        features[:, 0] += 0.1
    if kind == "outlier":  # takes all the levels of int8
        features[:, 0] *= 1e4
        queries[:3, 0] *= 1e4
    queries, features = queries * scales[0], features * scales[1]
    bank = make_bank(features, metric, backend, device)
    true = true_similarities(queries, features, metric)
    for n in (60, 20):
        found = bank._scanner()(queries.to(device), n)
        of_found = true.gather(1, found.indices.cpu())
        assert (found.lower.cpu() <= of_found).all()
        assert (of_found <= found.upper.cpu()).all()
        unseen = true.scatter(1, found.indices.cpu(), -torch.inf)
        assert (unseen <= found.unseen.cpu()).all()
        assert all(len(set(rows)) == n for rows in found.indices.tolist())


@each_backend
@both_metrics
def test_bounds_hold_for_a_query_of_zeros(device, metric, backend):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(31))
    true = torch.zeros(60) if metric == "cosine" else -features.double().square().sum(1)
    found = make_bank(features, metric, backend, device)._scanner()(torch.zeros(1, 5, device=device), 20)
    of_found = true[found.indices.cpu()]
    assert (found.lower.cpu() <= of_found).all()
    assert (of_found <= found.upper.cpu()).all()


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["normal", "rectified", "outlier", "one and tiny ones", "negative", "constant"]
)
def test_residuals_hold_what_codes_lose(device, precision, kind):
    rows = torch.randn(5, 2**14, generator=torch.Generator().manual_seed(32))
    if kind == "rectified":
        rows = rows.relu()
    if kind == "outlier":
        rows[:, 0] = 1e6
    if kind == "one and tiny ones":  # a level is 1: each of these is lost, and float32 forgets it beside 128
        rows = torch.full_like(rows, 2.0**-18)
        rows[:, 0] = 255
    if kind == "negative":
        rows = -rows.abs()
    if kind == "constant":
        rows[:] = 1 / 3
    norms = rows.double().norm(dim=1).to(device)
    found = codes.encode(rows.to(device), norms, precision)
    decoded = found.scale[:, None] * (found.values[:].double() - found.zero[:, None])
    assert ((decoded.cpu() - rows.double()).norm(dim=1) <= found.residual.cpu()).all()
    assert (found.sums == (found.values[:].sum(1) if precision == "int8" else 0)).all()


@pytest.mark.parametrize(("precision", "widest"), [("int8", 0.04), ("bfloat16", 0.04), ("float32", 0.0005)])
def test_bounds_are_not_so_loose_as_to_be_useless(device, precision, widest):
    # 256 levels cost a vector of equally spread features some 1 / (255 sqrt(12) / sqrt(3)) of its length.
    generator = torch.Generator().manual_seed(21)
    features, queries = torch.rand(400, 300, generator=generator), torch.rand(5, 300, generator=generator)
    found = make_bank(features, "cosine", precision, device)._scanner()(queries.to(device), 10)
    assert 0 < (found.upper - found.lower).max() < widest


@each_precision
@both_metrics
def test_the_scan_keeps_the_best_rows(device, metric, backend):
    # Far enough apart for any precision: row i is turned by i degrees from the query.
    angles = torch.arange(300) * torch.pi / 300
    features = torch.stack([angles.cos(), angles.sin()], 1)[torch.randperm(300, generator=torch.Generator())]
    bank = make_bank(features, metric, backend, device)
    found = bank._scanner()(torch.tensor([[1.0, 0.0]], device=device), 40)
    nearest = brute_force(torch.tensor([[1.0, 0.0]]), features, metric, 30)[1]
    assert set(nearest[0].tolist()) <= set(found.indices[0].tolist())


@both_metrics
@pytest.mark.parametrize("kind", ["rectified", "normal", "near ties", "scaled"])
def test_bounded_similarities_hold_the_exact_ones(device, metric, kind):
    generator = torch.Generator().manual_seed(22)
    queries, features = torch.randn(9, 2048, generator=generator), torch.randn(50, 2048, generator=generator)
    if kind == "rectified":
        queries, features = queries.relu(), features.relu()
    if kind == "near ties":
        features = queries[:1] * (1 + 2.0**-22 * torch.randint(-2, 3, features.shape, generator=generator))
    if kind == "scaled":
        features *= 10.0 ** torch.randint(-20, 20, (50, 1), generator=generator)
    rows = torch.rand(9, 50, generator=generator) < 0.4
    rows[4] = False  # a query of no pair
    norms = features.double().norm(dim=1)
    true = true_similarities(queries, features, metric)[rows]
    both = queries.to(device), features.to(device)
    pairs = metric, *(part.to(device) for part in rows.nonzero(as_tuple=True))
    lower, upper = (bound.cpu() for bound in exact.bounded_similarities(*both, norms.to(device), *pairs))
    assert (lower <= true).all()
    assert (true <= upper).all()
    if kind != "scaled":
        size = 1 if metric == "cosine" else queries.norm(dim=1).max() * norms.max()
        assert (upper - lower).max() < 6e-4 * size
    in_float64 = exact.exact_similarities(*both, *pairs).cpu()
    torch.testing.assert_close(in_float64, true, rtol=1e-12, atol=1e-12)


def test_dots_are_the_same_sampled_and_gathered():
    generator = torch.Generator().manual_seed(23)
    queries, features = torch.randn(9, 96, generator=generator), torch.randn(40, 96, generator=generator)
    pairs = (torch.rand(9, 40, generator=generator) < 0.3).nonzero(as_tuple=True)
    expected = (queries.double() @ features.double().T)[pairs]
    for dots in (exact._sampled_dots, exact._gathered_dots):
        for segments in (1, 4):
            torch.testing.assert_close(
                dots(queries, features, *pairs, segments), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("n", [1, 5, 100, 1000])
@pytest.mark.parametrize("size", [1000, 1003, 4001])
def test_top_equals_topk(n, size):
    scores = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    scores[0] = scores[0].round()  # ties
    found, where = scan._top(scores, n)
    assert found.sort(descending=True).values.tolist() == scores.topk(n).values.tolist()
    assert torch.equal(scores.gather(1, where), found)
    assert all(len(set(row)) == n for row in where.tolist())


@each_precision
def test_a_bank_that_moves_is_scanned_where_it_is(device, backend):
    generator = torch.Generator().manual_seed(24)
    features, queries = torch.randn(90, 8, generator=generator), torch.randn(4, 8, generator=generator)
    bank = make_bank(features, "cosine", backend)
    before = bank.votes(queries, 5)
    assert torch.equal(bank.to(device).votes(queries.to(device), 5).cpu(), before)


def test_auto_takes_float32_for_narrow_features_and_the_fastest_for_wide_ones(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    assert make_bank(torch.ones(3, 10), "cosine")._scanner().precision == "float32"
    assert make_bank(torch.ones(3, 1152), "cosine")._scanner().precision == "int8"
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    assert make_bank(torch.ones(3, 1152), "cosine")._scanner().precision == "float32"


def test_int8_has_a_greatest_width(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    wide = torch.ones(2, 2**16 + 1)
    assert make_bank(wide, "cosine")._scanner().precision == "float32"
    with pytest.raises(ValueError, match=r"at most 65536 features for `backend='int8'`, but got 65537"):
        make_bank(wide, "cosine", "int8").votes(wide, 1)


def test_int8_products_are_exact_at_their_greatest_width(device):
    # Processors without an instruction for int8 sum pairs of products in 16 bits, which 127 x 127 overflows.
    extremes = torch.tensor([127, -128], dtype=torch.int8, device=device).repeat(9)[:, None]
    values = extremes.expand(18, 2**16).contiguous()
    assert torch.equal(codes.products(values, values), 2**16 * extremes.int() * extremes.int().T)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "float32"), ((7, 5), "int8"), ((9, 0), "int8")]
)
def test_a_gpu_is_fastest_in_int8_if_it_has_tensor_cores_for_it(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    assert codes.fastest(torch.device("cuda"), 1152) == precision


@pytest.fixture
def unknown_int8():
    """Nothing is known yet of the device's products, nor afterwards."""
    codes._int8_is_exact.cache_clear()
    yield
    codes._int8_is_exact.cache_clear()


@pytest.mark.parametrize("works", [True, False])
def test_int8_is_refused_where_it_overflows(monkeypatch, unknown_int8, works):
    def saturating(left, right):  # as oneDNN without VNNI: pairs of products in 16 bits
        if not works:
            raise RuntimeError("not implemented")
        pairs = (left.int()[:, None] * right.T.int()).unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2).int()

    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("torch._int_mm", saturating)
    wide = torch.ones(3, 1152)
    assert make_bank(wide, "cosine")._scanner().precision == "float32"
    with pytest.raises(ValueError, match="Expected exact int8 products for `backend='int8'`"):
        make_bank(wide, "cosine", "int8").votes(wide, 1)


def test_votes_look_no_closer_where_all_in_doubt_have_one_label(device, monkeypatch):
    # 40 copies of one row tie: whichever 10 vote, they vote alike unless labels differ.
    features = torch.randn(1, 16, generator=torch.Generator().manual_seed(25)).expand(40, 16).contiguous()
    others = torch.randn(100, 16, generator=torch.Generator().manual_seed(26))
    looked = []
    for odd in (False, True):
        labels = torch.cat([torch.full((40,), 2), torch.zeros(100).long()])
        labels[7] = 4 if odd else 2
        bank = MemoryBank(torch.cat([features, others]), labels, torch.arange(140), 5, backend="float32").to(
            device
        )
        original = bank._exact
        looked.clear()
        bank._exact = lambda *pairs, original=original: looked.append(len(pairs[-1])) or original(*pairs)
        assert bank.votes(features[:1].to(device), 10).tolist() == [
            [0, 0, 9, 0, 1] if odd else [0, 0, 10, 0, 0]
        ]
        assert sum(looked) == (40 if odd else 0)


@pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")
def test_faiss_is_asked_for_no_more_rows_than_it_can_find(device):
    # On a GPU no more than 2048. Ties of three distinct rows widen the scan beyond.
    features = torch.eye(3).repeat(200, 1)
    bank = make_bank(features, "cosine", "faiss", device)
    scan = bank._scanner()
    original = scan._index.search
    scan._index = SimpleNamespace(
        ntotal=600, search=lambda queries, n: original(queries, n) if n <= 50 else None
    )
    scan._most = 50
    check(bank, torch.eye(3), 9, *brute_force(torch.eye(3), features, "cosine", 9))


@pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")
@both_metrics
def test_backends_vote_alike(device, metric):
    generator = torch.Generator().manual_seed(16)
    features = torch.randn(2000, 50, generator=generator).relu()
    queries = torch.randn(100, 50, generator=generator).relu().to(device)
    ours, theirs = (make_bank(features, metric, backend, device) for backend in ("int8", "faiss"))
    assert torch.equal(ours.votes(queries, 75), theirs.votes(queries, 75))
    assert torch.equal(ours.search(queries, 75)[1], theirs.search(queries, 75)[1])


@both_metrics
@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_out_of_range(metric, k):
    bank = make_bank(torch.ones(8, 2), metric)
    for method in (bank.search, bank.votes):
        with pytest.raises(
            ValueError, match=rf"Expected `k` to be in \[1, 8\] \(the bank's rows\), but got {k}\."
        ):
            method(torch.ones(1, 2), k)


def test_leaving_one_out_leaves_one_row_fewer():
    bank = make_bank(torch.ones(8, 2), "cosine")
    own = torch.tensor([0])
    assert bank.search(torch.ones(1, 2), 7, own)[1].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"\[1, 7\] \(the bank's rows less the image's own\), but got 8"):
        bank.search(torch.ones(1, 2), 8, own)


def test_leaving_one_out_leaves_out_all_rows_of_an_image():
    bank = make_bank(torch.eye(5), "euclidean", ids=torch.tensor([3, 1, 3, 3, 2]))
    own = torch.tensor([3, 1])
    assert bank.search(torch.eye(5)[:2], 2, own)[1].tolist() == [[1, 4], [0, 2]]
    for refused in (lambda: bank.votes(torch.eye(5)[:2], 3, own), lambda: bank.leave_one_out_votes(3)):
        with pytest.raises(ValueError, match=r"\[1, 2\] \(the bank's rows less the image's own\), but got 3"):
            refused()


@both_metrics
def test_no_queries(device, metric):
    bank = make_bank(torch.ones(8, 2), metric, device=device)
    assert bank.search(torch.empty(0, 2, device=device), 3)[1].shape == (0, 3)
    assert bank.votes(torch.empty(0, 2, device=device), 3).shape == (0, 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_and_queries_must_be_finite(value):
    features = torch.ones(8, 3)
    bank = make_bank(features, "cosine")
    broken = features.clone()
    broken[2, 1] = broken[5, 0] = value
    with pytest.raises(ValueError, match=r"finite features, but 2 of 8 rows.*network's weights"):
        make_bank(broken, "cosine")
    with pytest.raises(ValueError, match="Expected finite query features"):
        bank.votes(broken, 2)


@pytest.mark.parametrize("shape", [(4, 2), (4, 4), (3,), (1, 1, 3)])
def test_queries_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"queries of shape \(B, 3\) as in the bank, but got"):
        make_bank(torch.ones(8, 3), "cosine").votes(torch.ones(shape), 2)


@pytest.mark.parametrize(
    ("features", "labels", "ids"),
    [((4, 2), 3, 4), ((4, 2), 4, 5), ((4,), 4, 4), ((0, 2), 0, 0), ((4, 2, 1), 4, 4), ((4, 0), 4, 4)],
)
def test_shapes_that_disagree(features, labels, ids):
    with pytest.raises(ValueError, match="Expected at least one row and column of features"):
        MemoryBank(torch.ones(features), torch.zeros(labels).long(), torch.zeros(ids).long(), 2)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_beyond_the_classes(wrong):
    with pytest.raises(
        ValueError, match=rf"labels` in \[0, 4\] \(the classes\), but got {min(wrong, 0)} to {max(wrong, 4)}"
    ):
        MemoryBank(torch.ones(3, 2), torch.tensor([0, 4, wrong]), torch.arange(3), 5)


def test_unknown_metric_or_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`metric` to be one of \('cosine', 'euclidean'\), but got 'l1'"):
        make_bank(torch.ones(2, 2), "l1")
    with pytest.raises(
        ValueError,
        match=r"`backend` to be one of \('auto', 'int8', .* 'faiss', 'ivf', 'hnsw'\), but got 'annoy'",
    ):
        make_bank(torch.ones(2, 2), "cosine", "annoy")


def test_two_faiss_distributions_are_an_error(monkeypatch):
    monkeypatch.setattr(
        faiss_backend, "import_faiss", faiss_backend.import_faiss.__wrapped__
    )  # not the cache
    names = ("torch", "faiss-gpu", "Faiss-CPU", None)
    monkeypatch.setattr(
        faiss_backend, "distributions", lambda: [SimpleNamespace(name=name) for name in names]
    )
    with pytest.raises(
        ImportError, match=r"one faiss distribution, but found faiss-cpu, faiss-gpu.*pip uninstall"
    ):
        make_bank(torch.ones(3, 2), "cosine", "faiss").votes(torch.ones(1, 2), 1)


@pytest.mark.parametrize("error", [ImportError("No module named 'faiss'"), RuntimeError("libcudart.so")])
def test_unusable_faiss_is_an_error_that_names_the_remedy(monkeypatch, error):
    def broken(name, *args, **kwargs):
        if name == "faiss":
            raise error
        return original(name, *args, **kwargs)

    original = __import__
    monkeypatch.setattr(
        faiss_backend, "import_faiss", faiss_backend.import_faiss.__wrapped__
    )  # not the cache
    monkeypatch.setattr("builtins.__import__", broken)
    monkeypatch.setattr(faiss_backend, "distributions", list)
    with pytest.raises(ImportError, match=r"Expected a working faiss.*faiss-cpu.*backend='auto'"):
        make_bank(torch.ones(3, 2), "cosine", "faiss").votes(torch.ones(1, 2), 1)


def test_the_bank_is_not_saved_with_checkpoints():
    assert make_bank(torch.ones(3, 2), "cosine").state_dict() == {}


def test_exact_under_torchs_newer_precision_switches(device):
    """Once they are set, torch refuses to say what its older switch stands at."""
    generator = torch.Generator().manual_seed(20)
    features, queries = torch.randn(300, 32, generator=generator), torch.randn(20, 32, generator=generator)
    bank = make_bank(features, "cosine", device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(bank, queries, 25, *brute_force(queries, features, "cosine", 25))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(device, dtype):
    features = torch.rand(9, 4)
    with pytest.raises(ValueError, match="Expected float32 features"):
        make_bank(features.to(dtype), "cosine", device=device)
    with pytest.raises(ValueError, match="Expected float32 queries"):
        make_bank(features, "cosine", device=device).votes(features.to(device, dtype), 3)


@each_backend
@both_metrics
def test_nearby_rows_are_nearly_the_nearest(device, metric, backend):
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(900, 64, generator=generator)
    queries = torch.randn(30, 64, generator=generator)
    bank = make_bank(features, metric, backend, device)
    similarities, rows = bank.nearby(queries.to(device), 40)
    distances = torch.from_numpy(true_distances(queries, features, metric))
    true = 1 - distances if metric == "cosine" else -distances.square()
    own = true.gather(1, rows.cpu())
    scale = 1 if metric == "cosine" else 200  # about the squares' size
    assert (similarities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(similarities.cpu(), own, rtol=0, atol=0.02 * scale)
    # Whatever is missing is hardly more similar than what is there.
    fortieth = true.sort(dim=1, descending=True).values[:, 39:40]
    assert (own >= fortieth - 0.04 * scale).all()
    assert all(len(set(each)) == 40 for each in rows.tolist())


@both_metrics
@pytest.mark.parametrize("stored", [False, True])
def test_combine_sums_weighted_rows(device, metric, stored):
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(50, 7, generator=generator)
    features[3] = 0
    rows = torch.tensor([[4, 3, 4, 49], [0, 1, 2, 3]])  # out of order, one of them twice
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    kept = StoredRows(7, torch.float32, None, device) if stored else features.to(device)
    if stored:
        kept.append(features)
    labels = torch.zeros(50).long().to(device)
    bank = MemoryBank(kept, labels, torch.arange(50).to(device), 1, metric)
    sums = bank.combine(rows.to(device), weights.to(device)).cpu()
    x = features.double().numpy()
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    expected = np.stack([w @ x[r] for w, r in zip(weights.numpy(), rows.numpy(), strict=True)])
    np.testing.assert_allclose(sums, expected, atol=1e-6)


@both_metrics
def test_a_bank_of_one_class(device, metric):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    bank = make_bank(features, metric, device=device)
    queries = torch.randn(4, 5, generator=torch.Generator().manual_seed(8))
    own, rows = bank.of_class(2)
    assert rows.tolist() == [row for row, label in enumerate(bank.labels.tolist()) if label == 2]
    assert own.labels.tolist() == [2] * len(rows)
    distances, found = own.search(queries.to(device), 3)
    members = rows.cpu()
    expected, places = brute_force(queries, features[members], metric, 3)
    assert rows[found].tolist() == members[torch.from_numpy(places)].tolist()
    np.testing.assert_allclose(distances.cpu(), expected, rtol=1e-12, atol=2e-12)
    with pytest.raises(ValueError, match=r"one of \[0, 1, 2, 3, 4\], but got 7"):
        bank.of_class(7)
