"""The benchmarks run, write their results and find ours exact; no test asserts a time."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import attacks, blas, headline, large, measure, pipeline, report, scans, search
from benchmarks.kept import Kept
from lightning_advknn.experiment.training import fit, instantiate
from lightning_advknn.modules import BackboneModule
from lightning_advknn.reports.render.page import with_marked

ROOT = Path(__file__).parents[1]
COLUMNS = ["device", "case", "method", "seconds", "peak_mib", "exact"]

pytestmark = [
    # 850 images in batches of 32 are 27 steps; Lightning logs each 50th, and says so.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options for a short experiment on the embedded digits, whose backbone has trained for an epoch."""
    folder = tmp_path_factory.mktemp("benchmarks")
    config = folder / "attack.yaml"
    text = (ROOT / "configs" / "digits" / "attack.yaml").read_text().replace("steps: 40", "steps: 3")
    text = text.replace("config: ", f"config: {ROOT}/configs/digits/")
    config.write_text(text)
    experiment = report.experiment(str(config), None, None)
    cli = instantiate(experiment.backbone, BackboneModule, 0, None, torch.device("cpu"))
    cli.trainer.fit_loop.max_epochs = 1
    fit(cli, experiment.backbone, folder / "backbone.ckpt", 0)
    return ["--quick", f"--config={config}", f"--backbone={folder / 'backbone.ckpt'}", "--threads=1"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    """Measure in this process, because starting others takes longer."""

    def here(module, function, threads, variables=None, **arguments):
        return json.loads(json.dumps(getattr(importlib.import_module(module), function)(**arguments)))

    for benchmark in (attacks, large, pipeline, search):
        monkeypatch.setattr(benchmark, "in_child", here)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lines(name):
    """Records of a benchmark; also checks its JSON file."""
    made = json.loads(Path(f"runs/benchmarks/{name}.json").read_text())
    assert {"command", "settings", "versions", "commit", "device", "date"} <= set(made)
    with Path(f"runs/benchmarks/{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert all(float(row["seconds"]) >= 0 and row["device"] for row in rows)
    return rows


def test_search(trained, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "fastest_for", lambda *_: {})
    quick = [*trained, "--repeats=2", "--rows=100"]
    assert search.main([*quick, "--prepare"]) == []
    assert not Path("runs/benchmarks/search.csv").exists()
    search.main([*quick, "--layers", "relu3", "--cases", "bim"])  # a part of it, then all
    first = {(row["case"], row["method"]): row for row in lines("search")}
    assert len(first) == len(scans.METHODS) + 5  # the queries, and making ready but of bare products
    assert not any("all layers" in case for case, _ in first)
    search.main([*quick, "--cases", "bim", "leave-one-out", "disk"])
    rows = lines("search")
    kept = {(row["case"], row["method"]): row for row in rows}
    assert {key: kept[key]["seconds"] for key in first} == {key: row["seconds"] for key, row in first.items()}
    judged = [row for row in rows if row["exact"] and row["method"].startswith("lightning_advknn")]
    assert len(judged) == 2 * 2 * 5 + 1  # precisions, cases, layers and their sum; and on disk
    assert {(row["exact"], row["differing"]) for row in judged} == {("True", "0")}
    assert {row["method"] for row in rows} == set(scans.METHODS)
    bim = [row for row in rows if row["case"].endswith("bim queries") and row["method"] == "torch"]
    (total,) = (row for row in bim if "all layers" in row["case"])
    own = [row for row in bim if row is not total]
    assert float(total["min"]) >= 0.99 * sum(float(row["min"]) for row in own)
    assert float(total["max"]) <= 1.01 * sum(float(row["max"]) for row in own)
    assert {row["repeats"] for row in bim} == {"2"}
    assert all(row["blas"] for row in own)
    others = [row for row in rows if row["method"] == "torch" and row["case"].endswith("leave-one-out")]
    assert {float(row["measured_share"]) for row in others} == {round(100 / 850, 4)}

    def again(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(search, "in_child", again)
    search.main([*quick, "--cases", "bim", "leave-one-out", "disk"])
    assert lines("search") == rows


def test_wrong_votes_are_counted():
    right = torch.tensor([[3, 0], [2, 1], [0, 3], [1, 2]])
    known = {"bim_votes": right, "checked": torch.tensor([0, 2, 3]), "checked_votes": right[[0, 2, 3]]}
    assert scans._judge(right.flip(1), known, "bim") == {"differing": 4, "checked": 4}
    wrong = right.index_fill(0, torch.tensor([1, 2]), 0)
    assert scans._judge(wrong, known, scans.LEAVE_ONE_OUT) == {"differing": 1, "checked": 3}
    assert scans._judge(right[:1], known, scans.LEAVE_ONE_OUT) == {"differing": 0, "checked": 1}


def test_attacks(trained):
    attacks.main([*trained, "--repeats=1"])
    rows = lines("attacks")
    assert {row["exact"] for row in rows if row["method"] == "lightning_advknn"} == {"True"}
    assert {row["method"] for row in rows} == set(attacks.METHODS)
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("knn_acc", "attacked_acc", "success"))
    one = [row for row in rows if row["method"] == "torchattacks, one batch"]
    assert {row["differing"] for row in one} == {"0"}


def test_pipeline(trained):
    summary = ROOT / "results" / "mnist" / "seed0.json"
    pipeline.main([*trained, f"--summary={summary}", f"--before={summary}"])
    rows = lines("pipeline")
    starts = [row for row in rows if row["method"] == "import torch"]
    assert {row["case"] for row in starts} > {"import lightning_advknn", "lightning-advknn --help"}
    ours = [row for row in rows if row["method"] == "lightning_advknn"]
    assert {row["exact"] for row in ours[: -len(starts)]} == {"True"}
    seconds = {row["case"]: float(row["seconds"]) for row in rows if row["method"] == "before"}
    stages = [value for case, value in seconds.items() if not case.endswith("all stages")]
    assert seconds["quick, MNIST: all stages"] == pytest.approx(sum(stages), rel=1e-3)
    assert {float(row["ratio"]) for row in rows if row["method"] == "before"} == {1.0}


def test_large(monkeypatch):
    pytest.importorskip("faiss")
    large.main(["--quick", "--threads=1"])
    rows = lines("large")
    assert len(rows) == 3 * 3 * 3  # sizes, cases, methods
    judged = [row for row in rows if row["checked"]]
    ours = [row for row in judged if row["method"] == "lightning_advknn"]
    assert [row["rows"] for row in ours] == ["2000", "4000", "8000"]
    assert {(row["exact"], row["differing"], row["recall"]) for row in ours} == {("True", "0", "")}
    approximate = [row for row in judged if row not in ours]
    assert {row["method"] for row in approximate} == {"ivf", "hnsw"}
    assert all(0.5 < float(row["recall"]) <= 1 and not row["exact"] for row in approximate)
    first = [row for row in rows if row["rows"] == "2000"]
    assert {row["linear"] for row in first} == {"1.0", ""}
    for row in ours:
        each = (float(one["cpu_seconds"]) / float(one["rows"]) for one in (row, ours[0]))
        assert float(row["linear"]) == pytest.approx(next(each) / next(each), rel=2e-3)
    # 640 MiB and 120 bytes a row. HNSW adds 3 bytes a feature, 328 bytes a row, and its training sample.
    memory = {row["method"]: float(row["memory_mib"]) for row in first}
    assert memory["lightning_advknn"] == pytest.approx(640 + 2000 * 120 / 2**20, abs=0.1)
    hnsw = 2000 * (120 + 3 * 64 + 8 + 320) + 4 * 4 * 2000 * 64
    assert memory["hnsw"] == pytest.approx(640 + hnsw / 2**20, abs=0.1)

    def again(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(large, "in_child", again)
    large.main(["--quick", "--threads=1"])
    assert lines("large") == rows


def test_a_child_has_a_peak_of_its_own():
    held = torch.ones(2**27)  # 512 MiB
    assert measure.in_child("benchmarks.measure", "peak_mib", 1) < 200
    assert measure.peak_mib() > held.nbytes / 2**20


def test_a_failing_child_is_an_error():
    with pytest.raises(RuntimeError, match=r"benchmarks\.measure\.nothing"):
        measure.in_child("benchmarks.measure", "nothing", 1)


def test_measurements_are_kept(tmp_path):
    path = tmp_path / "folder" / "kept.jsonl"
    kept = Kept(path)
    kept.add(layer="a", turn=0, seconds=1.5)
    kept.add(layer="b", turn=0, seconds=2.5)
    with path.open("a") as file:
        file.write('{"layer": "c", "tur')  # killed
    again = Kept(path)
    assert [line["seconds"] for line in again.lines] == [1.5, 2.5]
    again.add(layer="c", turn=0, seconds=3.5)
    assert [line["seconds"] for line in Kept(path).having(turn=0)] == [1.5, 2.5, 3.5]
    assert Kept(path).having(layer="b", turn=1) == []


def test_children_choose_their_kernels(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1")
    get = {"module": "os", "function": "getenv", "threads": 1}
    assert measure.in_child(**get, key="OPENBLAS_CORETYPE") is None
    assert measure.in_child(**get, key="OPENBLAS_L2_SIZE") is None
    assert measure.in_child(**get, variables={"OPENBLAS_CORETYPE": "Zen"}, key="OPENBLAS_CORETYPE") == "Zen"


def test_faiss_gets_its_fastest_kernel(monkeypatch):
    seconds = {None: 0.9, "SkylakeX": None, "Haswell": 0.2, "Zen": 0.3}

    def in_child(module, function, threads, variables, quiet):
        found = seconds[variables.get("OPENBLAS_CORETYPE")]
        if found is None:
            raise RuntimeError("illegal instruction")
        return found

    monkeypatch.setattr(blas, "in_child", in_child)
    assert blas.fastest_for.__wrapped__("faiss", 1) == {"OPENBLAS_CORETYPE": "Haswell"}
    assert blas.fastest_for.__wrapped__("torch", 1) == {}


def test_kernels_are_named():
    faiss = pytest.importorskip("faiss")
    assert faiss.IndexFlatIP(4).ntotal == 0
    assert blas.used("faiss").startswith(("OpenBLAS", "MKL"))
    assert blas.used("torch").endswith(torch.backends.cpu.get_cpu_capability())


def row(method, seconds, **others):
    return {"case": "MNIST: all layers, 9 bim queries", "method": method, "seconds": str(seconds), **others}


def test_the_fastest_peer_counts_even_if_it_misses_a_vote():
    rows = [
        row("lightning_advknn", 2.0, exact="True"),
        row("lightning_advknn float32", 1.0, exact="True"),
        row("scikit-learn", 9.0, exact="True"),
        row("torch", 5.0, exact="False"),
        row("bare product", 1.0),
        row("faiss", ""),
    ]
    found = headline.compare(rows)
    assert (found.ours["method"], found.peer["method"], found.ratio) == ("lightning_advknn", "torch", 2.5)
    assert headline.compare(rows[:2]) is None
    assert headline.compare(rows[2:]) is None


def test_attacks_are_compared_at_equal_success():
    rows = [
        row("lightning_advknn", 8.0, attacked_acc="0.0"),
        row("lightning_advknn winograd", 4.0, attacked_acc="0.0"),
        row("lightning_advknn bfloat16", 2.0, attacked_acc="0.01"),
        row("torchattacks", 12.0, attacked_acc="0.0"),
        row("torchattacks, one batch", 10.0, attacked_acc="0.0"),
        row("torchattacks bfloat16", 3.0, attacked_acc="0.0"),
    ]
    found = headline.compare(rows)
    assert (found.ours["method"], found.peer["seconds"]) == ("lightning_advknn winograd", "10.0")
    assert headline.compare([rows[2], rows[3]]) is None


@pytest.mark.parametrize("page", headline.PAGES)
def test_pages_have_what_results_have(page):
    text = (ROOT / page).read_text()
    made = headline.PAGES[page](ROOT / "results" / "benchmarks")
    assert with_marked(text, "speed", made) == text, "run `python -m benchmarks.headline`"
    assert "times** as fast" in text or page != "README.md"
    with pytest.raises(ValueError, match="markers"):
        with_marked("nothing", "speed", made)
