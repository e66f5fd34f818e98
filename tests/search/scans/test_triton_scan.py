"""The scan in one Triton kernel: in Triton's interpreter on a CPU, compiled on a GPU.

Triton decides on import whether it interprets, so without a GPU these tests run in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from lightning_advknn.search import MemoryBank
from lightning_advknn.search.scans import torch_scan, triton_scan
from lightning_advknn.search.scans.quantize import encode
from lightning_advknn.search.scans.torch_scan import TorchScan
from lightning_advknn.search.scans.triton_scan import TritonScan
from tests.real_gpu import REAL_GPU
from tests.search.oracle import both_metrics, brute_force, check, make_bank, true_similarities

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if REAL_GPU and not INTERPRETED else "cpu")

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
runs_the_kernel = pytest.mark.skipif(
    not (INTERPRETED or triton_scan.runs_on(DEVICE)), reason="runs in the interpreter's process"
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 x 16, of which 4 are kept, so that few rows make many blocks: the interpreter is slow."""
    for name, value in {"_QUERIES": 16, "_ROWS": 16, "_WIDTH": 32, "_KEPT": 4, "_WARPS": 4}.items():
        monkeypatch.setattr(triton_scan, name, value)
    monkeypatch.setattr("lightning_advknn.search.nearest._MARGIN", 4)


@pytest.fixture
def scanned_again(monkeypatch):
    """The numbers of queries that `TorchScan` is asked for."""
    asked = []
    usual = TorchScan._best_in

    def best_in(self, query, rows, n):
        asked.append(len(query.values))
        return usual(self, query, rows, n)

    monkeypatch.setattr(TorchScan, "_best_in", best_in)
    return asked


def vectors(n, width, seed, kind="normal"):
    made = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    if kind == "sparse":  # as after a ReLU
        made = (made - 1).relu()
    if kind == "zeros":  # every third is a zero vector
        made[::3] = 0
    return made


def make_scan(features, metric):
    features = features.to(DEVICE)
    return TritonScan(features, features.double().norm(dim=1), metric, "int8")


def make_query(scan, queries):
    queries = queries.to(DEVICE)
    norms = queries.double().norm(dim=1)
    return scan.query(encode(queries, norms, "int8"), norms)


def exact_scores(scan, query):
    """Of all rows, in float64 from int64 products of codes, and the sums of their terms' sizes, ``(B, M)``."""
    products = query.values.cpu().long() @ scan.codes.values.cpu().long().T
    terms = [products.double() * scan._weights.cpu().double()]
    for left, right in zip(query.left, scan._right, strict=True):
        terms.append(left.cpu().double() * right.cpu().double())
    return sum(terms), sum(term.abs() for term in terms)


def rounded_scores(scan, query):
    """The same in float32, each operation rounded as the device does it."""
    if triton_scan._fuses(DEVICE) and not INTERPRETED:
        return scan.scores(query, slice(0, len(scan.codes.values))).cpu()
    # NumPy, in which the interpreter computes, has no fused multiplication.
    scores = (query.values.cpu().long() @ scan.codes.values.cpu().long().T).float() * scan._weights.cpu()
    for left, right in zip(query.left, scan._right, strict=True):
        scores = scores + left.cpu() * right.cpu()
    return scores


@runs_the_kernel
@both_metrics
@pytest.mark.parametrize(
    ("n_queries", "n_rows", "width", "kind"),
    [
        (1, 40, 5, "normal"),
        (7, 33, 16, "sparse"),
        (16, 48, 32, "normal"),
        (19, 50, 77, "zeros"),
        (20, 9, 100, "sparse"),
    ],
)
def test_a_query_keeps_the_best_of_each_block(small_blocks, metric, n_queries, n_rows, width, kind):
    scan = make_scan(vectors(n_rows, width, 1, kind), metric)
    query = make_query(scan, vectors(n_queries, width, 2, kind))
    blocks = -(-n_rows // 16)
    scores, places = (each.cpu() for each in scan._kept(query, slice(0, n_rows), blocks))
    rounded, places = rounded_scores(scan, query), places.long()
    assert scores.shape == places.shape == (n_queries, blocks, 4)
    assert torch.equal(scores.flatten(1), rounded.gather(1, places.flatten(1)))
    # Each operation rounds by 2^-24 of a number that is at most the sum of all terms' sizes.
    exact, size = exact_scores(scan, query)
    assert ((rounded - exact).abs() <= 16 * 2.0**-24 * size).all()
    for block in range(blocks):
        own = torch.arange(block, n_rows, blocks)
        best = rounded[:, own].topk(4).values
        assert torch.equal(scores[:, block], best)
        assert set(places[:, block].unique().tolist()) <= set(own.tolist())
    assert all(len(set(row)) == blocks * 4 for row in places.flatten(1).tolist())


@runs_the_kernel
@both_metrics
def test_the_real_blocks_keep_the_same(metric):
    scan = make_scan(vectors(260, 150, 3, "sparse"), metric)
    query = make_query(scan, vectors(130, 150, 4, "sparse"))
    scores, places = (each.cpu() for each in scan._kept(query, slice(0, 260), 3))
    rounded = rounded_scores(scan, query)
    assert torch.equal(scores.flatten(1), rounded.gather(1, places.flatten(1).long()))
    for block in range(3):
        assert torch.equal(scores[:, block], rounded[:, block::3].topk(8).values)


@runs_the_kernel
@both_metrics
@pytest.mark.parametrize(
    ("scales", "kind"),
    [
        ((1, 1), "normal"),
        ((1e-6, 1e3), "sparse"),
        ((1e9, 1e9), "zeros"),
        ((1e-25, 1e-41), "normal"),
        ((1e19, 1e25), "zeros"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy says what overflows
def test_bounds_hold_what_the_scan_finds_and_what_it_does_not(small_blocks, metric, kind, scales):
    queries, features = vectors(7, 40, 5, kind) * scales[0], vectors(100, 40, 6, kind) * scales[1]
    q, x = queries.double(), features.double()
    if metric == "cosine":
        lengths = q.norm(dim=1, keepdim=True) * x.norm(dim=1)
        true = torch.where(lengths > 0, q @ x.T / lengths, 0.0)
    else:
        true = true_similarities(queries, features, metric)
    found = make_scan(features, metric)(queries.to(DEVICE), 7)  # of as many blocks
    indices = found.indices.cpu()
    of_found = true.gather(1, indices)
    assert (found.lower.cpu() <= of_found).all()
    assert (of_found <= found.upper.cpu()).all()
    assert (true.scatter(1, indices, -torch.inf) <= found.unseen.cpu()).all()
    assert all(len(set(rows)) == 7 for rows in indices.tolist())


@runs_the_kernel
def test_a_block_that_holds_too_many_of_the_best_hides_none(small_blocks, scanned_again):
    # The 16 rows of block 3 of 10 are the nearest to the first query, and only to that.
    features = vectors(160, 40, 7)
    queries = vectors(5, 40, 8)
    features[3::10] = queries[0] + 0.01 * features[3::10]
    scan = make_scan(features, "cosine")
    found = scan(queries.to(DEVICE), 10)
    assert 1 <= scanned_again[0] < 5
    best = rounded_scores(scan, make_query(scan, queries)).topk(10).indices
    assert set(best[0].tolist()) <= set(range(3, 160, 10))
    assert [set(row) for row in found.indices.tolist()] == [set(row) for row in best.tolist()]


@runs_the_kernel
def test_more_candidates_than_blocks_are_left_to_torch(small_blocks, scanned_again):
    scan = make_scan(vectors(100, 40, 9), "cosine")
    assert scan(vectors(4, 40, 10).to(DEVICE), 8).indices.shape == (4, 8)
    assert scanned_again == [4]


@runs_the_kernel
def test_a_bank_is_scanned_in_several_parts(small_blocks, scanned_again, monkeypatch):
    limits = torch_scan._limits(DEVICE)._replace(scores=400)
    monkeypatch.setattr(torch_scan, "_limits", lambda device: limits)
    scan = make_scan(vectors(230, 40, 11), "euclidean")
    queries = vectors(4, 40, 12)
    found = scan(queries.to(DEVICE), 5)  # of 100 rows, of 100, and of 30 in too few blocks
    assert scanned_again[-1] == 4
    best = rounded_scores(scan, make_query(scan, queries)).topk(5).indices
    assert [set(row) for row in found.indices.tolist()] == [set(row) for row in best.tolist()]


@runs_the_kernel
@pytest.mark.parametrize(("metric", "leave_one_out"), [("cosine", False), ("euclidean", True)])
def test_votes_equal_brute_force(small_blocks, metric, leave_one_out):
    features, queries = vectors(180, 20, 13, "zeros"), vectors(9, 20, 14)
    features[150:] = features[:30]  # ties
    queries[0], own = 0, None
    if leave_one_out:
        queries, own = features[:9], torch.arange(9)
    bank = make_bank(features, metric, "triton", DEVICE)
    expected = brute_force(queries, features, metric, 2, own)
    check(bank, queries, 2, *expected, own if own is None else own.to(DEVICE))


@runs_the_kernel
def test_votes_with_the_real_blocks_equal_brute_force(scanned_again, monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.nearest._MARGIN", 4)
    features, queries = vectors(1300, 70, 15, "sparse"), vectors(6, 70, 16, "sparse")
    bank = make_bank(features, "cosine", "triton", DEVICE)
    check(bank, queries, 2, *brute_force(queries, features, "cosine", 2))
    assert not scanned_again, "11 blocks are enough for 10 candidates"


def test_the_kernel_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the process of the interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("capability", "product", "fused"), [(80, "mma.sync", False), (90, "wgmma.mma_async", True)]
)
def test_the_kernel_compiles(capability, product, fused, tmp_path, monkeypatch):
    # Without a GPU, up to machine code: slow, so each kind of GPU in one way.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_advknn.search.scans.triton_kernel import best_of_blocks

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("queries", "rows"), "*i8")
    pointers |= dict.fromkeys(("weights", "left", "right", "scores"), "*fp32") | {"places": "*i32"}
    numbers = dict.fromkeys(("n_queries", "n_rows", "blocks", "width", "right_stride"), "i32")
    blocks = {"terms": 3, "fused": fused, "kept": triton_scan._KEPT}
    for name in ("queries", "rows", "width"):
        blocks[f"block_{name}"] = getattr(triton_scan, f"_{name.upper()}")
    source = ASTSource(
        best_of_blocks, pointers | numbers | dict.fromkeys(blocks, "constexpr"), constexprs=blocks
    )
    options = {"num_warps": triton_scan._WARPS, "num_stages": triton_scan._STAGES, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert product in compiled.asm["ptx"]
    assert ".s32.s8.s8" in compiled.asm["ptx"]
    assert ("fma.rn.f32" in compiled.asm["ptx"]) == fused
    assert compiled.metadata.shared <= 99 * 1024  # what the smallest of these GPUs has for a program


def test_whether_products_are_fused(device):
    # float64 holds products of float32 exactly.
    a, b, c = vectors(3, 1000, 17).to(device)
    once = (a.double() * b.double() + c.double()).float()
    twice = a * b + c
    assert not torch.equal(once, twice)
    assert torch.equal(torch.addcmul(c, a, b), once if triton_scan._fuses(device) else twice)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes any device")
def test_the_kernel_wants_a_gpu():
    bank = make_bank(vectors(50, 4, 18), "cosine", "triton")
    with pytest.raises(
        ValueError, match=r"Expected a CUDA device of compute capability 8.*but got cpu\. Use"
    ):
        bank.votes(vectors(2, 4, 19), 3)


def test_the_backend_wants_triton(monkeypatch):
    monkeypatch.setattr("lightning_advknn.search.backends.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Expected Triton for `backend='triton'`.*Use `backend='auto'`"):
        make_bank(vectors(50, 4, 20), "cosine", "triton")


def test_too_many_features():
    with pytest.raises(ValueError, match=r"at most 65536 features for `backend='triton'`, but got 65537"):
        MemoryBank(torch.ones(2, 65537), torch.zeros(2).long(), torch.arange(2), 1, "cosine", "triton")
