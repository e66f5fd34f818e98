"""Sweeps offline: what is drawn, the command that W&B's agent would run, two trials with all that they log."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from pytorch_lightning import Trainer
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_advknn.commands import sweep
from lightning_advknn.commands.main import main
from lightning_advknn.data import Digits
from lightning_advknn.models import ConvNet
from lightning_advknn.modules import BackboneModule
from lightning_advknn.training_cli import AdvKNNCLI
from tests.wandb_runs import offline_wandb, read_runs

ROOT = Path(__file__).parents[2]
SWEEPS = [path.relative_to(ROOT) for path in sorted(ROOT.glob("configs/*/sweep.yaml"))]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the digits' configurations, their training cut short, and an untrained backbone."""
    shutil.copytree(ROOT / "configs" / "digits", tmp_path / "configs" / "digits")
    path = tmp_path / "configs" / "digits" / "surrogate.yaml"
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
    }
    config["trainer"]["callbacks"][1]["init_args"] |= {
        "num_images": 4,
        "num_calibration": 4,
        "bank_size": 100,
        "eps_curve": [],
    }
    config["trainer"]["callbacks"][1]["init_args"]["attacks"]["bim"]["settings"]["steps"] = 10
    path.write_text(yaml.safe_dump(config))

    network = yaml.safe_load((path.with_name("network.yaml")).read_text())["init_args"]
    trainer = Trainer(
        logger=False, enable_checkpointing=False, limit_train_batches=0, accelerator="cpu", max_epochs=1
    )
    trainer.fit(BackboneModule(ConvNet(**network)), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "runs/digits/backbone/version_0/checkpoints/best.ckpt")
    monkeypatch.chdir(tmp_path)
    with offline_wandb(tmp_path) as environment:
        environment.delenv("WANDB_MODE")  # a sweep's trials are offline unless it says otherwise
        environment.setattr(sweep, "subprocess", SimpleNamespace(run=run_here))
        yield tmp_path


def run_here(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
    """Run a trial's command in this process: importing torch takes longer than the trial."""
    env_command, interpreter, option, module, *arguments = command
    assert (env_command, interpreter, check) == ("/usr/bin/env", sys.executable, False)
    assert (option, module) == ("-m", "lightning_advknn")
    wandb.teardown()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_RUN_GROUP"):
            patch.setenv(name, env[name])
        code = main(arguments)
        wandb.finish()
    return subprocess.CompletedProcess(command, code)


def value_of(config: dict[str, Any], name: str) -> Any:
    """Of an argument as a trial names it; those of callbacks belong to the last."""
    for key in name.split("."):
        config = config[-1][key] if isinstance(config, list) else config[key]
    return config


def test_two_trials_run_offline(home: Path) -> None:
    assert main(["sweep", "digits/sweep", "--trials", "2"]) == 0  # as its header says
    written = yaml.safe_load((home / "configs" / "digits" / "sweep.yaml").read_text())
    trials = sweep._draw_trials(written, 2)
    assert trials[0] != trials[1]
    runs = read_runs(home / "runs" / "digits")
    assert len(runs) == 2
    for trial, run in zip(trials, runs, strict=True):
        start = run.of("run")[0]
        assert (start["project"], start["run_group"]) == ("lightning-advknn", "digits-surrogate")
        assert start["job_type"] == "surrogate"
        assert len(trial) == 4
        for name, value in trial.items():
            assert value_of(run.config["config"], name) == value
        (last,) = run.history(written["metric"]["name"])
        assert 0 <= last[written["metric"]["name"]] <= 1
        key = "samples/fgsm/table"
        eps = trial["trainer.callbacks.init_args.eps"]
        assert run.table(key)["linf"] == pytest.approx([eps] * 4, abs=1e-6)
        layers = set(run.table(key)["votes_after"][0].replace("; ", ": ").split(": ")[::2])
        assert trial["model.init_args.layer"] in layers
        first = run.table(key)["votes_after"][0].split("; ")[0].split(": ")[1]
        assert sum(int(part.split(" for ")[0]) for part in first.split(", ")) == trial["model.init_args.k"]


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_the_command_is_the_one_of_wandbs_agent(path: Path) -> None:
    written = yaml.safe_load((ROOT / path).read_text())
    for trial in sweep._draw_trials(written, 3):
        # As `wandb.wandb_agent.Agent` expands it.
        macros = create_sweep_command_args({"args": {name: {"value": v} for name, v in trial.items()}})
        macros |= {"interpreter": ["python"], "program": [written["program"]], "env": ["/usr/bin/env"]}
        theirs: list[str] = []
        for part in create_sweep_command(list(written["command"])):
            theirs += macros[part[2:-1]] if part.startswith("${") else [part]
        ours = sweep._command_of(written, trial)
        assert ours[1] == sys.executable
        assert [ours[0], "python", *ours[2:]] == theirs


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_every_value_is_one_that_training_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DATA_DIR", "unused")
    written = yaml.safe_load(path.read_text())
    assert {name.rpartition(".")[2] for name in written["parameters"]} == {"cls_weight", "layer", "k", "eps"}
    config = written["command"][written["command"].index("--config") + 1]
    assert config == f"{path.parent.name}/surrogate"
    backbone = yaml.safe_load(path.with_name("backbone.yaml").read_text())["model"]["init_args"]
    lists = {name: parameter["values"] for name, parameter in written["parameters"].items()}
    assert lists["model.init_args.layer"] == backbone["layers"]
    for place in (0, -1):
        trial = {name: values[place] for name, values in lists.items()}
        options = [f"--{name}={value}" for name, value in trial.items()]
        cli = AdvKNNCLI([f"--config={config}", "--trainer.accelerator=cpu", *options], run=False)
        assert cli.model.cls_weight == trial["model.init_args.cls_weight"]
        assert (cli.model.layer, cli.model.k) == (trial["model.init_args.layer"], trial["model.init_args.k"])


def test_trials_are_of_the_grid_and_no_two_alike() -> None:
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"values": ["x", "y"]}, "c": {"value": None}}
    everything = [{"a": a, "b": b, "c": None} for a in (1, 2, 3) for b in ("x", "y")]
    grid = {"method": "grid", "parameters": parameters}
    assert sweep._draw_trials(grid, 100) == everything
    assert sweep._draw_trials(grid, 4) == everything[:4]
    drawn = sweep._draw_trials({**grid, "method": "random"}, 100)
    assert drawn != everything
    assert sorted(map(str, drawn)) == sorted(map(str, everything))
    assert sweep._draw_trials({**grid, "method": "random"}, 3) == drawn[:3]
    assert sweep._draw_trials({**grid, "method": "random"}, 100, seed=1) != drawn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "bayes"}, "Expected `method` to be grid or random, but got 'bayes'"),
        ({"parameters": {"lr": {"min": 0.1, "max": 1}}}, "Expected `values` of lr, but got {'max'"),
        ({"command": None}, "to be a W&B sweep, but it has no command"),
    ],
)
def test_what_only_the_server_can_draw_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    written = yaml.safe_load((ROOT / "configs" / "digits" / "sweep.yaml").read_text()) | change
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in written.items() if value is not None}))
    assert sweep.main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_sweep_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    assert sweep.main([str(path)]) == 2
    for text in ("a: [", "- 1", ""):
        path.write_text(text)
        assert sweep.main([str(path)]) == 2
        assert "lightning-advknn sweep: error: Expected" in capsys.readouterr().err


def test_a_failed_trial_shows_in_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {
        "program": "-c",
        "method": "grid",
        "parameters": {"x": {"values": [0, 1]}},
        "command": [
            "${interpreter}",
            "${program}",
            "import sys; sys.exit(sys.argv[1] == '--x=1')",
            "${args}",
        ],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(written))
    assert sweep.main([str(path), "--trials", "1"]) == 0
    assert sweep.main([str(path), "--trials", "2"]) == 1
