"""The benchmark of a GPU, on a CPU with tiny sizes: what it compares is right, and what fails is said."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    bim,
    ceilings,
    clock,
    commands,
    experiment,
    jobs,
    kernels,
    layers,
    repeats,
    suite,
    synthetic,
    votes,
)
from benchmarks.gpu.sizes import TINY
from lightning_advknn import evaluation
from lightning_advknn.search.scans.quantize import _int8_is_exact

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CPU_BATCH", TINY.images)  # which are filled up


def measured(part: ModuleType) -> list[clock.Record]:
    found = list(part.measure(CPU, TINY, None))
    if not _int8_is_exact(CPU):
        found = [record for record in found if "exact int8 products" not in record.get("failed", "")]
    assert not [record for record in found if "failed" in record]
    assert json.loads(json.dumps(found)) == found
    return found


def test_ceilings() -> None:
    found = measured(ceilings)
    assert len(found) == 1 + 4 * (1 + len(TINY.widths))
    square = next(record for record in found if record["method"] == "bfloat16")
    assert square["rate"] == pytest.approx(2e-12 * TINY.side**3 / square["min"])
    right = _int8_is_exact(CPU)  # not on every processor
    assert right in {record["exact"] for record in found if record["method"] == "int8"}


def test_right_votes_are_those_of_numpy() -> None:
    made = synthetic.scene(40, 20, CPU, TINY)
    bank, queries = (each.double().numpy() for each in (made.bank, made.queries))
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    nearest = np.argsort(-(queries @ bank.T / norms).round(12), axis=1, kind="stable")[:, : TINY.k]
    counts = [np.bincount(made.labels.numpy()[each], minlength=10) for each in nearest]
    assert made.right.tolist() == np.stack(counts).tolist()


@pytest.mark.parametrize("part", [votes, layers, kernels])
def test_searches_are_exact(part: ModuleType) -> None:
    found = measured(part)
    judged = [record for record in found if "differing" in record]
    assert {(record["exact"], record["differing"]) for record in judged} == {(True, 0)}
    assert {record["method"] for record in judged} > {report.OURS} or part is votes
    if part is layers:
        totals = [record for record in found if "all layers" in record["case"]]
        assert {record["method"] for record in totals} == {report.OURS, "torch float32"}
        for total in totals:
            own = [r for r in judged if r["method"] == total["method"] and r is not total]
            assert total["seconds"] == pytest.approx(sum(record["seconds"] for record in own))
            assert total["checked"] == TINY.checked * len(TINY.widths)


def test_wrong_votes_are_counted() -> None:
    right = torch.tensor([[3, 0], [2, 1], [0, 3]])
    assert synthetic.differing(right.flip(1)[:2], right[:2]) == {"exact": False, "differing": 2, "checked": 2}
    assert synthetic.differing(right, right[:2])["differing"] == 0


def test_bim() -> None:
    found = {record["method"]: record for record in measured(bim)}
    assert set(found) >= {
        "lightning_advknn",
        "lightning_advknn bfloat16, no graph",
        "torchattacks, one batch",
    }
    for name in ("lightning_advknn", "lightning_advknn, no graph", "torchattacks", "torchattacks, one batch"):
        assert found[name]["differing"] == 0  # of torchattacks, an independent implementation
    assert all(record["repeated"] and 0 <= record["success"] <= 1 for record in found.values())
    by_hand = 2 * TINY.images * TINY.steps  # forward, and back to the images alone
    # Multiplications and additions of the convolutions and of the linear layer, per image.
    once = 2 * (14 * 14 * 64 * 64 + 128 * 36 * 64 * 7 * 7 + 128 * 25 * 128 * 3 * 3 + 10 * 1152)
    assert {record["work"][0][0] for record in found.values()} == {by_hand * once}
    ceilings_of = {method: record["work"][0][1] for method, record in found.items()}
    assert ceilings_of["lightning_advknn, no graph"] == "float32"
    assert ceilings_of["lightning_advknn bfloat16"] == "bfloat16"
    assert ceilings_of["torchattacks"] == "tf32"


def test_launches_and_syncs() -> None:
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch"]
    names += ["cudaStreamSynchronize", "cudaMemcpyAsync", "aten::mm", "cudaDeviceSynchronize"]
    assert clock.launches_and_syncs(names) == {"launches": 4, "syncs": 1}


def test_repeats() -> None:
    found = measured(repeats)
    assert len(found) == 2 * 3 + 1 + 4
    assert {record["exact"] for record in found} == {True}


def test_an_attack_that_changes_is_seen() -> None:
    random = torch.Generator().manual_seed(0)
    assert not repeats._twice(lambda: torch.rand(3, generator=random), CPU)["exact"]


def test_jobs_end_well_or_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(_: str) -> dict[str, list[str]]:
        late = "import time; time.sleep(60)"
        return {
            "digits": ["-c", "open('FOLDER/x', 'w')"],
            "gpu1": ["-c", "import sys; sys.exit('no GPU')"],
            "two ranks": ["-c", late],
        }

    monkeypatch.setattr(jobs, "commands", made)
    monkeypatch.setitem(jobs._LIMITS, "two ranks", 0.5)
    well, wrong, late = jobs.measure(CPU, TINY, None)
    assert "failed" not in well
    assert wrong["failed"] == "exit code 1: no GPU"
    assert late["failed"].startswith("not done after")


def test_jobs_are_commands_of_this_project() -> None:
    for job in jobs.commands("cuda").values():
        script = job[0] if job[0] != "-m" else job[4]
        assert (ROOT / script).is_file()
        assert all((ROOT / part).is_file() for part in job if part.startswith("configs/"))


def test_the_experiment_is_shown_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str], _limit: float) -> tuple[clock.Record, str]:
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir()
        summary = {"seconds": {"train origin": 2.0, "query clean": 1.5}, "metrics": {}}
        (output / "summary.json").write_text(json.dumps(summary))
        return {"seconds": 4.0}, ""

    monkeypatch.setattr(experiment, "run", run)
    found = {record["case"]: record["seconds"] for record in experiment.measure(CPU, TINY, "data")}
    assert found["MNIST experiment: whole command"] == 4.0
    assert found["MNIST experiment: query clean"] == 1.5
    assert found["MNIST experiment: all stages"] == 3.5
    (alone,) = experiment.measure(CPU, TINY, None)
    assert "--root" in alone["failed"]


def test_what_pytest_counts() -> None:
    assert suite.counts("...F\n2 failed, 1402 passed, 3 deselected in 9.1s") == {
        "checked": 1404,
        "differing": 2,
        "exact": False,
    }
    assert suite.counts("1402 passed, 5 warnings in 1s")["exact"]
    assert suite.counts("no tests ran") == {}


def child(text: str) -> Callable[[str], list[str]]:
    return lambda part: [sys.executable, "-c", text]


def test_records_come_before_a_part_fails_or_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    says = 'print(\'{"case": "a", "method": "m"}\', flush=True); print(\'noise\', flush=True); '
    first, failed = command.run_parts(["votes"], 60, child(says + "raise ValueError('wrong')"))
    assert first == {"case": "a", "method": "m", "part": "votes"}
    assert failed["failed"] == "exit code 1: ValueError: wrong"
    monkeypatch.setitem(command.PARTS, "votes", 1.0)
    first, failed = command.run_parts(["votes"], 60, child(says + "import time; time.sleep(60)"))
    assert first["case"] == "a"
    assert failed["failed"].startswith("not done after 1 s")
    (skipped,) = command.run_parts(["bim"], 5, child(says))
    assert skipped["failed"] == "no time was left"


def test_shares_of_ceilings() -> None:
    records = [
        {"case": "product", "method": "int8", "seconds": 1.0, "rate": 4.0},
        {"case": "product", "method": "float32", "seconds": 1.0, "rate": 1.0},
        {"case": "q", "method": report.OURS, "seconds": 2.0, "work": [[4e12, "int8"], [0.5e12, "float32"]]},
        {"case": "q", "method": "torch", "seconds": 3.0, "work": [[1e12, "bfloat16"]]},
        {"case": "bim", "method": report.OURS, "failed": "late"},
    ]
    found = command.finished(records)
    assert found[2]["limit_share"] == pytest.approx(0.75)  # 1 s of int8 and half a second of float32, of 2 s
    assert "limit_share" not in found[3]  # that ceiling failed
    assert [record["ratio"] for record in found[2:]] == [1.0, 1.5, None]
    assert not any("work" in record for record in found)


def test_every_part_is_a_module_and_all_have_time() -> None:
    for part in command.PARTS:
        assert (ROOT / "benchmarks" / "gpu" / f"{part}.py").is_file()
    assert set(command.PARTS) == {p.__name__.rsplit(".", 1)[1] for p in (bim, ceilings, kernels, layers)} | {
        "votes",
        "repeats",
        "experiment",
        "jobs",
        "suite",
    }


def test_the_command_writes_as_records_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    seen = []

    def parts(*_: object) -> object:
        yield {"case": "a", "method": report.OURS, "seconds": 1.0, "part": "bim"}
        seen.extend(csv.DictReader(Path("out/gpu.csv").read_text().splitlines()))
        yield {"case": "b", "method": report.OURS, "failed": "late", "part": "bim"}

    monkeypatch.setattr(command, "run_parts", parts)
    assert command.main(["--output=out"]) == 0
    assert [row["case"] for row in seen] == ["a"]
    rows = list(csv.DictReader(Path("out/gpu.csv").read_text().splitlines()))
    assert [(row["case"], row["seconds"], row["failed"]) for row in rows] == [
        ("a", "1.0", ""),
        ("b", "", "late"),
    ]
    assert {"device", "launches", "syncs", "limit_share"} <= set(rows[0])
    assert json.loads(Path("out/gpu.json").read_text())["device"] == "GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_one_part_in_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.child", "ceilings", "cpu", "tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["method"] for line in lines[:2]] == ["copy", "float32"]
    assert commands.REPOSITORY == ROOT
