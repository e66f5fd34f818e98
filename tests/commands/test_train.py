"""train.py as a user runs it: files it leaves, what a checkpoint may not decide, W&B's mode, logged settings."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from pytorch_lightning.loggers import WandbLogger

import lightning_advknn
from lightning_advknn.data import SVHN, Digits
from lightning_advknn.models import ConvNet
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.modules.checkpoint import AtomicCheckpointIO
from lightning_advknn.training_cli import AdvKNNCLI
from tests.wandb_runs import offline_wandb, read_runs

pytestmark = [
    pytest.mark.xdist_group("train_script"),  # they share one training
    # Most runs here leave the checkpoint's own callbacks out; all log into folders of their own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

ROOT = Path(__file__).parents[2]
BACKBONE, SURROGATE = (ROOT / "configs" / "digits" / f"{kind}.yaml" for kind in ("backbone", "surrogate"))
RunCLI = Callable[..., AdvKNNCLI]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which ``train.py fit`` has run for an epoch, and its process."""
    folder = tmp_path_factory.mktemp("script")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, ROOT / "train.py", "fit", "--config", BACKBONE, "--wandb_mode", "disabled"]
    process = subprocess.run(
        [*command, "--trainer.max_epochs", "1"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return folder, process


@pytest.fixture(scope="module")
def checkpoint(fitted: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return fitted[0] / "runs" / "digits" / "backbone" / "version_0" / "checkpoints" / "best.ckpt"


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RunCLI]:
    """Run train.py's command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))

    def run(*arguments: Any, **options: Any) -> AdvKNNCLI:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return AdvKNNCLI(**options)

    yield run
    wandb.finish()


def quiet(folder: Path) -> list[str]:
    """Options for a run without the attacks, that logs to CSV files alone."""
    return [
        "--trainer.callbacks=null",
        "--trainer.logger=pytorch_lightning.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


def last_values(metrics: Path) -> dict[str, float]:
    """The last value of each column of a CSV log."""
    with metrics.open() as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def test_fit_leaves_a_log_and_checkpoints(
    fitted: tuple[Path, subprocess.CompletedProcess[str]], checkpoint: Path
) -> None:
    folder, process = fitted
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    logged = last_values(folder / "runs" / "digits" / "backbone" / "version_0" / "metrics.csv")
    assert logged["epoch"] == 0
    assert logged["val/acc"] > 0.3  # about 850 images, seen once
    for name in (
        "train/loss",
        "val/loss",
        "attack/fgsm/knn_acc",
        "attack/bim/dknn_acc",
        "attack/clean/dnn_acc",
    ):
        assert name in logged
    assert {path.name for path in checkpoint.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    content = torch.load(checkpoint, weights_only=True)
    assert content["epoch"] == 0
    assert content["hyper_parameters"]["learning_rate"] == 0.001
    assert list(folder.iterdir()) == [folder / "runs"]
    assert not list(folder.rglob("*.wandb"))


@pytest.mark.parametrize(("stage", "split"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_is_evaluated_as_it_was_saved(
    run_cli: RunCLI, checkpoint: Path, tmp_path: Path, stage: str, split: str
) -> None:
    cli = run_cli(stage, "--config", BACKBONE, "--ckpt_path", checkpoint, *quiet(tmp_path))

    network = ConvNet()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network.network."): value for name, value in state.items()})
    images = Digits().split(split)
    with torch.no_grad():
        correct = (network.eval()(images.images / 255).argmax(1) == images.labels).sum().item()
    assert cli.trainer.callback_metrics[f"{split}/acc"].item() == pytest.approx(correct / len(images))
    logged = last_values(next(tmp_path.rglob("metrics.csv")))
    assert logged[f"{split}/acc"] == pytest.approx(correct / len(images))


def test_a_checkpoint_does_not_overrule_the_command_line(
    run_cli: RunCLI, checkpoint: Path, tmp_path: Path
) -> None:
    cli = run_cli(
        "validate",
        f"--config={BACKBONE}",
        "--model.init_args.learning_rate=0.5",
        "--model.init_args.layers=[relu1,logits]",
        f"--ckpt_path={checkpoint}",
        *quiet(tmp_path),
    )
    assert isinstance(cli.model, BackboneModule)
    assert cli.model.learning_rate == 0.5
    assert cli.model.network.layers == ("relu1", "logits")


def test_a_checkpoint_does_not_overrule_the_config(run_cli: RunCLI, checkpoint: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(BACKBONE.read_text())
    config["model"]["init_args"].update(learning_rate=0.25, network=str(BACKBONE.with_name("network.yaml")))
    config["data"] = str(BACKBONE.with_name("data.yaml"))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    cli = run_cli("validate", "--config=own.yaml", f"--ckpt_path={checkpoint}", *quiet(tmp_path))
    assert cli.model.learning_rate == 0.25


def test_a_checkpoint_does_not_choose_the_class(run_cli: RunCLI, checkpoint: Path, tmp_path: Path) -> None:
    # Under the checkpoint's `class_path` this would quietly validate the backbone.
    with pytest.raises(ValueError, match=r"its kind is 'backbone', not 'surrogate'.*the checkpoint's own"):
        run_cli(
            "validate",
            f"--config={SURROGATE}",
            f"--model.init_args.backbone_checkpoint={checkpoint}",
            f"--ckpt_path={checkpoint}",
            *quiet(tmp_path),
        )


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_another_architectures_checkpoint_is_refused(
    run_cli: RunCLI, checkpoint: Path, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(
        ValueError, match=r"network is '\S+\.ConvNet', not '\S+\.LeNet5'.*the checkpoint's own"
    ):
        run_cli(
            stage,
            f"--config={BACKBONE}",
            "--model.init_args.network=lightning_advknn.models.LeNet5",
            f"--ckpt_path={checkpoint}",
            *quiet(tmp_path),
        )


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ([], None, "offline"),
        (["--wandb_mode=disabled"], None, "disabled"),
        (["--wandb_mode=online"], None, "online"),
        (["--wandb_mode=online"], "disabled", "disabled"),
        ([], "disabled", "disabled"),
    ],
)
def test_wandb_mode_is_passed_on_unless_the_environment_says_it(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, options: list[str], before: str | None, after: str
) -> None:
    if before is None:
        monkeypatch.delenv("WANDB_MODE")
    else:
        monkeypatch.setenv("WANDB_MODE", before)
    run_cli(f"--config={BACKBONE}", *options, run=False)
    assert os.environ["WANDB_MODE"] == after


def test_wandb_mode_counts_under_a_subcommand_too(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    logger = {"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = ["--wandb_mode=disabled", *quiet(tmp_path), f"--trainer.logger={logger}"]
    run_cli("validate", f"--config={BACKBONE}", *options[:-4], options[-1])
    assert os.environ["WANDB_MODE"] == "disabled"


def test_wandb_is_told_nothing_without_its_logger(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name)
    run_cli(f"--config={BACKBONE}", *quiet(tmp_path), run=False)
    assert not {"WANDB_MODE", "WANDB_DATA_DIR"} & os.environ.keys()
    run_cli(f"--config={BACKBONE}", run=False)
    assert os.environ["WANDB_MODE"] == "offline"
    assert Path(os.environ["WANDB_DATA_DIR"]) == tmp_path / "runs" / "digits" / "wandb"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--wandb_mode=loud"],
        ["--model.init_args.learning_rate=fast"],
        ["--model.init_args.learning_rat=1"],
        ["--trainer.epochs=1"],
    ],
)
def test_a_wrong_option_ends_with_exit_code_2(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_cli("fit", f"--config={BACKBONE}", *arguments)
    assert caught.value.code == 2
    assert arguments[0].split("=")[0].rsplit(".")[-1].strip("-") in capsys.readouterr().err


def test_the_whole_config_reaches_every_logger(
    run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: seen.append(params))
    loggers = [
        {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
        {"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}},
    ]
    run_cli(
        "validate",
        f"--config={BACKBONE}",
        *quiet(tmp_path)[3:],
        "--trainer.callbacks=null",
        f"--trainer.logger={loggers}",
        "--data.init_args.val_size=20",
        "--model.init_args.learning_rate=0.125",
    )
    kept = yaml.safe_load(next(tmp_path.rglob("hparams.yaml")).read_text())["config"]
    (to_wandb,) = [params["config"] for params in seen if "config" in params]
    (named,) = [params["versions"] for params in seen if "versions" in params]
    assert named["torch"] == torch.__version__.partition("+")[0] or named["torch"] == torch.__version__
    assert named["lightning-advknn"] == lightning_advknn.__version__
    assert {"python", "torchvision", "pytorch-lightning", "torchmetrics"} < named.keys()
    for config in (kept, to_wandb):
        assert config["seed_everything"] == 0
        assert config["model"]["class_path"] == "lightning_advknn.modules.BackboneModule"
        assert config["model"]["init_args"]["learning_rate"] == 0.125
        network = config["model"]["init_args"]["network"]
        assert network["class_path"] == "lightning_advknn.models.ConvNet"
        assert network["init_args"]["mean"] == [0.3051]
        assert config["data"]["class_path"] == "lightning_advknn.data.Digits"
        assert config["data"]["init_args"] == {
            "batch_size": 32,
            "eval_batch_size": 500,
            "val_size": 20,
            "calibration_per_class": 25,
            "split_seed": 0,
        }
        assert config["trainer"]["max_epochs"] == 18
        assert config["wandb_mode"] == "offline"


def test_svhn_goes_from_backbone_to_surrogate_to_test(
    run_cli: RunCLI, svhn_root: Path, tmp_path: Path
) -> None:
    shape = [3, 32, 32]
    network = {"class_path": "lightning_advknn.models.ConvNet", "init_args": {"image_shape": shape}}
    network["init_args"].update(mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    data = {
        "class_path": "lightning_advknn.data.SVHN",
        "init_args": {
            "root": str(svhn_root),
            "download": False,
            "verify_checksums": False,
            "batch_size": 20,
            "val_size": 60,
            "calibration_per_class": 30,
        },
    }
    last = tmp_path / "backbone" / "last.ckpt"
    models = {
        "backbone": {"class_path": "lightning_advknn.modules.BackboneModule", "init_args": {}},
        "surrogate": {
            "class_path": "lightning_advknn.modules.SurrogateModule",
            "init_args": {"backbone_checkpoint": str(last), "k": 5},
        },
    }
    results = {}
    for kind, model in models.items():
        model["init_args"].update(network=network, image_shape=shape)
        picker = {
            "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path / kind), "filename": "best", "save_last": True},
        }
        trainer = {
            "max_epochs": 2,
            "callbacks": [picker],
            "logger": False,
            "default_root_dir": str(tmp_path),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        config = tmp_path / f"{kind}.yaml"
        config.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
        run_cli("fit", f"--config={config}")
        config.write_text(
            yaml.safe_dump({"model": model, "data": data, "trainer": {**trainer, "callbacks": []}})
        )
        cli = run_cli("test", f"--config={config}", f"--ckpt_path={tmp_path / kind / 'last.ckpt'}")
        results[kind] = cli.trainer.callback_metrics
    assert isinstance(cli.model, SurrogateModule)
    assert isinstance(cli.datamodule, SVHN)
    assert results["backbone"].keys() == {"test/loss", "test/acc"}
    assert results["surrogate"].keys() == {"test/loss", "test/kl", "test/agreement", "test/acc"}
    # The fixture's classes are easy to tell apart.
    assert results["backbone"]["test/acc"] > 0.5
    assert results["surrogate"]["test/agreement"] > 0.5


@pytest.fixture
def resumable(tmp_path: Path) -> Iterator[list[str]]:
    """A fit of the backbone on a few images that logs to W&B offline, in an empty folder."""
    loggers = [
        {
            "class_path": "pytorch_lightning.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "own"},
        },
        {"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": {"save_dir": "runs"}},
    ]
    picker = {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {"filename": "best", "monitor": "val/acc", "mode": "max", "save_last": True},
    }
    with offline_wandb(tmp_path):
        yield [
            "fit",
            f"--config={BACKBONE}",
            f"--trainer.callbacks={[picker]}",
            f"--trainer.logger={loggers}",
            "--trainer.limit_train_batches=4",
            "--trainer.log_every_n_steps=1",
            *quiet(tmp_path)[3:],
            "--ckpt_path=last",
        ]


@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
def test_an_interrupted_run_goes_on_as_one(
    run_cli: RunCLI, resumable: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    def interrupt(module: BackboneModule) -> None:
        if module.current_epoch == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(BackboneModule, "on_train_epoch_start", interrupt)
        with pytest.raises(RuntimeError, match="power cut"):
            run_cli(*resumable, "--trainer.max_epochs=4")  # without a checkpoint, it starts
    wandb.finish()
    folder = tmp_path / "runs" / "own" / "version_0" / "checkpoints"
    before = torch.load(folder / "last.ckpt", weights_only=True)
    cli = run_cli(*resumable, "--trainer.max_epochs=4")
    wandb.finish()

    first, second = read_runs(tmp_path / "runs")
    assert first.of("run")[0]["run_id"] == second.of("run")[0]["run_id"] == before["wandb_run"]
    assert [[item["epoch"] for item in run.history("val/acc")] for run in (first, second)] == [[0, 1], [2, 3]]
    steps = [item["trainer/global_step"] for run in (first, second) for item in run.history("train/loss")]
    assert steps == list(range(16))
    accuracies = [item["val/acc"] for run in (first, second) for item in run.history("val/acc")]
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 3
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert cli.trainer.checkpoint_callback.best_model_score.item() == pytest.approx(max(accuracies))
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    # A checkpoint that is named goes on in its run too; a run that is named wins.
    named = [*resumable[:-1], f"--ckpt_path={folder / 'last.ckpt'}", "--trainer.max_epochs=4"]
    assert run_cli(*named).trainer.loggers[1].version == before["wandb_run"]
    wandb.finish()
    assert run_cli(*named, "--trainer.logger.init_args.id=mine").trainer.loggers[1].version == "mine"


def test_a_damaged_checkpoint_is_not_gone_on_from(
    run_cli: RunCLI, resumable: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "own" / "version_3" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"Expected runs/own/version_3/checkpoints/last.ckpt to"):
        run_cli(*resumable)
