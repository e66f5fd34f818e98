"""The benchmarks run, write their results and find ours exact; no test asserts a time."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import attacks, large, measure, pipeline, report, search
from lightning_advknn.experiment.training import fit, instantiate
from lightning_advknn.modules import BackboneModule

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

    def here(module, function, threads, **arguments):
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


def test_search(trained):
    search.main([*trained, "--layers", "relu3", "logits", "--rows=100"])
    rows = lines("search")
    judged = [row for row in rows if row["exact"] and row["method"].startswith("lightning_advknn")]
    assert len(judged) == 2 * 3 * 3 + 2  # precisions, cases, layers and their sum; and on disk or not
    assert {row["exact"] for row in judged} == {"True"}
    assert {row["differing"] for row in judged} == {"0"}
    assert {"faiss", "scikit-learn", "torch", "bare product"} < {row["method"] for row in rows}
    peer = [row for row in rows if row["method"] == "torch" and row["case"].endswith("leave-one-out")]
    assert {float(row["measured_share"]) for row in peer} == {round(100 / 850, 4)}


def test_attacks(trained):
    attacks.main(trained)
    rows = lines("attacks")
    assert {row["exact"] for row in rows if row["method"] == "lightning_advknn"} == {"True"}
    assert {"lightning_advknn winograd", "torchattacks", "foolbox"} < {row["method"] for row in rows}
    assert all(0 <= float(row["knn_acc"]) <= 1 for row in rows)


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
