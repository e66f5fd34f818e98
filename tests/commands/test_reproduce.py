"""`attack.py reproduce`: which cells a grid has, what of it is run, and what an interruption leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import attack
from lightning_advknn.commands.options import parse
from lightning_advknn.commands.reproduce import plan
from lightning_advknn.experiment import shards
from lightning_advknn.experiment.grid import Grid, cells
from tests.commands.test_evaluate import read, write_config
from tests.wandb_runs import offline_wandb, read_runs

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("reproduce")  # they share a grid that takes a while


def write_grid(folder: Path, **parts: Any) -> Path:
    """A grid of small experiments on the embedded digits."""
    write_config(folder / "digits", "digits", k=10)
    for name in ("backbone", "surrogate"):
        path = folder / "digits" / f"{name}.yaml"
        config = yaml.safe_load(path.read_text())
        config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 8}
        path.write_text(yaml.safe_dump(config))
    if not parts:
        parts = {
            "tables": {"config": "digits/attack.yaml", "seeds": [0, 1], "options": {"images": 300}},
            "neighbours": {
                "config": "digits/attack.yaml",
                "options": {"images": 200},
                "vary": {"victim.k": [5, 10]},
            },
        }
    grid = {
        "parts": {"digits": parts},
        **{name: str(folder / name) for name in ("results", "output", "cache")},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder / "grid.yaml"


def reproduce(grid: Path, *options: str) -> int:
    return attack.main(["reproduce", f"--config={grid}", *options])


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def tables(grid: Path) -> dict[str, list[dict[str, str]]]:
    results = grid.parent / "results"
    return {str(p.relative_to(results)): read(p) for p in results.rglob("table*.csv")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid, in shards of 100 images."""
    grid = write_grid(tmp_path_factory.mktemp("reproduce") / "grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 100))
        assert reproduce(grid) == 0
    return grid


@pytest.fixture
def copy(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished grid to go on from."""
    monkeypatch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 100))
    shutil.copytree(done.parent, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.yaml"):
        path.write_text(path.read_text().replace(str(done.parent), str(tmp_path / "copy")))
    return tmp_path / "copy" / "grid.yaml"


NAMES = [
    "digits/tables/seed0",
    "digits/tables/seed1",
    "digits/neighbours/k=5/seed0",
    "digits/neighbours/k=10/seed0",
]


def test_a_dry_run_shows_cells_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = write_grid(tmp_path / "grid")
    assert reproduce(grid, "--dry-run") == 0
    lines = capsys.readouterr().out
    assert [name for name in NAMES if name in lines] == NAMES
    assert lines.count("to do") == 4
    assert "--victim.k=5" in lines
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("*.csv"))


def test_cells_leave_results_where_the_grid_says(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = done.parent / "results" / "digits"
    assert {row["seed"] for row in read(results / "table2.csv")} == {"0", "1"}
    for k in (5, 10):
        rows = read(results / "neighbours" / f"k={k}" / "table2.csv")
        assert {(row["seed"], row["n"]) for row in rows} == {("0", "200")}
    assert {row["n"] for row in read(results / "table2.csv")} == {"300"}
    assert (done.parent / "results" / "report" / "index.html").is_file()
    assert reproduce(done, "--dry-run") == 0
    assert capsys.readouterr().out.count("done ") == 4


def test_a_cells_command_gives_the_cells_results(done: Path, copy: Path) -> None:
    (task,) = plan(read_grid(copy), ["digits/neighbours/k=5"])
    command = task.cell.command.removeprefix("lightning-advknn ").split()
    before = tables(copy)
    shutil.rmtree(task.cell.results)
    assert attack.main(command) == 0
    assert tables(copy) == before


def read_grid(config: Path) -> Grid:
    options = parse("reproduce", [f"--config={config}"], "")
    return Grid(**{name: getattr(options, name) for name in Grid.__dataclass_fields__})


def test_finished_cells_are_not_run_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_advknn.commands.reproduce.evaluate", None)  # calling it fails
    before = times(copy.parent / "results" / "digits")
    assert reproduce(copy) == 0
    assert times(copy.parent / "results" / "digits") == before
    assert capsys.readouterr().err.count(": done") == 4


def test_a_changed_setting_redoes_only_what_depends_on_it(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = yaml.safe_load(copy.read_text())
    grid["parts"]["digits"]["neighbours"]["vary"] = {"victim.k": [5, 20]}
    grid["parts"]["digits"]["neighbours"]["options"]["images"] = 100
    copy.write_text(yaml.safe_dump(grid))
    results = copy.parent / "results" / "digits"
    before, cached = times(results), times(copy.parent / "cache")
    assert reproduce(copy, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (shown.count("done "), shown.count("changed "), shown.count("to do ")) == (2, 1, 1)
    assert reproduce(copy) == 0
    after = times(results)
    kept = {name for name in before if before[name] == after.get(name)}
    assert {name for name in kept if name.startswith("neighbours/")} == {
        name for name in before if name.startswith("neighbours/k=10/")
    }
    assert {name for name in before if not name.startswith("neighbours/")} <= kept
    # k = 5 on fewer images needs nothing new; k = 20 needs its votes, surrogates, attacks and queries.
    assert cached.items() <= times(copy.parent / "cache").items()
    assert {row["n"] for row in read(results / "neighbours" / "k=5" / "table2.csv")} == {"100"}


def test_a_dashboard_has_a_run_of_each_experiment_and_one_of_the_report(copy: Path) -> None:
    missing = copy.parent / "results" / "digits" / "neighbours" / "k=5" / "seed0.json"
    missing.unlink()
    with offline_wandb(copy.parent):
        assert reproduce(copy, "--wandb_mode=offline") == 0
    place = copy.parent / "output"
    (cell,) = read_runs(place / "digits" / "neighbours" / "k=5" / "seed0")
    (report,) = read_runs(place)
    assert len(list(copy.parent.rglob("offline-run-*"))) == 2
    assert [run.of("run")[0]["job_type"] for run in (cell, report)] == ["evaluate", "reproduce"]
    assert cell.config["settings"]["victim"]["k"] == 5
    assert {row["n"] for row in read(missing.with_name("table2.csv"))} == {"200"}
    assert set(cell.table("tables/table2")["n"]) == {200}
    figures = sorted((copy.parent / "results" / "report").glob("*.png"))
    assert figures
    for figure in figures:
        assert report.media(f"figures/{figure.stem}").read_bytes() == figure.read_bytes()


def test_killed_in_the_middle_it_goes_on_and_equals_an_uninterrupted_grid(done: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid")
    script = (
        "import sys; from lightning_advknn.experiment import shards; shards._SHARD = {'cpu': 100, 'cuda': 100};"
        "import attack; sys.exit(attack.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "reproduce", f"--config={grid}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    # Killed as soon as the second cell attacks.
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    results = grid.parent / "results" / "digits"
    adversarial = grid.parent / "cache" / "adversarial"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (results / "seed0.json").is_file() and len(list(adversarial.rglob("*.safetensors"))) > 18 + 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished, cached = times(results), times(grid.parent / "cache")
    assert not (results / "seed1.json").is_file()
    completed = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert "digits/tables/seed0: done" in completed.stderr
    after = times(results)
    assert after["seed0.json"] == finished["seed0.json"]
    kept = {name for name in cached if not Path(name).name.startswith(".") and ".unfinished" not in name}
    assert kept <= set(times(grid.parent / "cache"))
    assert tables(grid) == tables(done)


def test_only_runs_what_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = write_grid(tmp_path / "grid")
    for pattern, names in (
        ("digits/tables", NAMES[:2]),
        ("*/seed1", NAMES[1:2]),
        ("digits/neighbours/k=5", NAMES[2:3]),
        ("digits/neighbours/k=5/seed0", NAMES[2:3]),
    ):
        assert reproduce(grid, "--dry-run", "--only", pattern) == 0
        shown = capsys.readouterr().out
        assert [name for name in NAMES if name in shown] == names


def test_missing_data_are_said_and_the_rest_goes_on(
    done: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(copy.parent / "svhn", "svhn", k=10)
    data = copy.parent / "svhn" / "data.yaml"
    content = yaml.safe_load(data.read_text())
    content["init_args"] |= {"root": str(tmp_path / "nowhere"), "download": False}
    data.write_text(yaml.safe_dump(content))
    grid = yaml.safe_load(copy.read_text())
    grid["parts"]["svhn"] = {"tables": {"config": "svhn/attack.yaml"}}
    copy.write_text(yaml.safe_dump(grid))
    assert reproduce(copy) == 0
    said = capsys.readouterr().err
    assert "svhn/tables/seed0: data missing" in said
    assert said.count(": done") == 4
    assert "data missing" in (copy.parent / "results" / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {"config": "digits/attack.yaml", "vary": {"victim.kk": [5]}}}, "victim.kk"),
        ({"tables": {"config": "digits/attack.yaml", "vary": {"victim.k": [5000]}}}, "victim.k"),
        ({"tables": {"config": "digits/attack.yaml", "seeds": [0, 0]}}, "double"),
        ({"tables": {"config": "digits/attack.yaml", "seeds": []}}, "digits/tables has none"),
        (
            {"tables": {"config": "digits/attack.yaml", "vary": {"victim.k": []}}},
            "digits/tables has none",
        ),
        ({"tables": {"config": "digits/attack.yaml", "options": {"images": 0}}}, "images"),
        (
            {"tables": {"config": "digits/attack.yaml"}, "layers": {"config": "digits/backbone.yaml"}},
            "layers",
        ),
    ],
)
def test_bad_grids_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    grid = write_grid(tmp_path / "grid", **change)
    try:
        code = reproduce(grid)
    except SystemExit as refused:
        code = int(refused.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("parts", "message"), [({}, "`parts` has none"), ({"digits": {}}, "digits has none")]
)
def test_a_grid_of_nothing_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cells(Grid(parts))


def test_patterns_that_match_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(write_grid(tmp_path / "grid"), "--only", "digits/table") == 2
    assert "digits/tables/seed0" in capsys.readouterr().err
