"""Training from the same YAML and modules as train.py, kept under a key of what decides the outcome."""

import json
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_advknn.callbacks import AttackEvaluation
from lightning_advknn.command_line import option_text
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.settings import Trained
from lightning_advknn.modules.checkpoint import check_identity, is_own, read_checkpoint
from lightning_advknn.modules.weights import load_weights
from lightning_advknn.search import APPROXIMATE
from lightning_advknn.storage import atomic_path, code_of, read_json, write_json
from lightning_advknn.training_cli import AdvKNNCLI

# Parts of a train.py configuration that say where things are or go, not what comes out.
_PLACES = {
    "data": {"root", "download", "verify_checksums", "eval_batch_size"},
    "trainer": {
        "accelerator",
        "default_root_dir",
        "devices",
        "enable_model_summary",
        "enable_progress_bar",
        "logger",
    },
    "model": {"backbone_checkpoint", "votes_file", "backend", "index"},
}


def instantiate(
    trained: Trained, kind: type[LightningModule], seed: int, root: str | None, device: torch.device
) -> AdvKNNCLI:
    """Model, data and trainer of a train.py configuration, as train.py makes them.

    Args:
        trained: The configuration, its overrides and perhaps a checkpoint.
        kind: What it must train.
        seed: Of weights and shuffling.
        root: Folder of the data files, instead of the configuration's.
        device: Where to train.

    Raises:
        ValueError: If the configuration is invalid, or the checkpoint is damaged, unsafe or of something else.
        FileNotFoundError: If the checkpoint is missing.
    """
    arguments = {
        "config": trained.config.absolute,
        "seed_everything": seed,
        **({} if root is None else {"data.init_args.root": root}),
        **{f"model.init_args.{name}": option_text(value) for name, value in trained.overrides.items()},
        "trainer.logger": "false",
        "trainer.enable_progress_bar": json.dumps(sys.stderr.isatty()),
        "trainer.enable_model_summary": "false",
        "trainer.accelerator": device.type,
        # One process: a launcher of several would run this whole program again in each.
        "trainer.devices": 1 if device.index is None else json.dumps([device.index]),
    }
    with warnings.catch_warnings():
        # It warns that `args` hide the command line; here that is the point.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            cli = AdvKNNCLI(
                [f"--{name}={value}" for name, value in arguments.items()],
                run=False,
                parser_kwargs={"exit_on_error": False},
            )
        except ArgumentError as error:
            raise ValueError(
                f"Expected {trained.config} to be a train.py configuration, but: {error}"
            ) from error
    if not isinstance(cli.model, kind):
        raise ValueError(
            f"Expected {trained.config} to train a {kind.__name__}, but it trains a {type(cli.model).__name__}."
        )
    _picker(cli, trained)
    if trained.checkpoint:
        checkpoint = read_checkpoint(Path(trained.checkpoint))
        model: Any = cli.model
        expected = model.identity(cli.datamodule.name)
        expected.pop("backbone", None)  # not loaded yet; compared when it is
        if not is_own(checkpoint, expected):  # whose weights are compared when they are loaded
            check_identity(checkpoint, expected, trained.checkpoint)
    return cli


def fit(cli: AdvKNNCLI, trained: Trained, checkpoint: Path, seed: int) -> None:
    """Train as train.py does and keep the best epoch; an interrupted run goes on from its last epoch.

    Args:
        cli: From `instantiate`.
        trained: What it was made of.
        checkpoint: Where the best epoch's weights go, with a JSON file of the settings and wall time beside.
        seed: Of weights and shuffling.

    Raises:
        KeyboardInterrupt: If training was interrupted.
        SystemExit: With code 143, if it was terminated.
    """
    trainer: Any = cli.trainer  # its attributes are set where type checkers do not see them
    unfinished = checkpoint.with_suffix(".unfinished")
    picker = _picker(cli, trained)
    picker.dirpath = str(unfinished)
    trainer.loggers = [CSVLogger(unfinished, name="log")]
    # They measure and do not train; the experiment measures afterwards.
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, AttackEvaluation)]
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    with warnings.catch_warnings():
        # It warns of going on where an interrupted run stopped; here that is the point.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=_last_epoch(unfinished),
                weights_only=True,
            )
        except SystemExit as error:
            if trainer.received_sigterm or error.code == 143:
                raise SystemExit(143) from None
            # What Lightning makes of Ctrl-C, after switching further ones off.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
    score = picker.best_model_score
    facts = {
        "training": training_settings(cli),
        "validation": {picker.monitor: None if score is None else float(score)},
        "seconds": round(time.perf_counter() - started, 3),
        **provenance(cli.model.device),
    }
    write_json(checkpoint.with_suffix(".json"), facts)
    with atomic_path(checkpoint) as temporary:
        shutil.copyfile(picker.best_model_path, temporary)
    shutil.rmtree(unfinished)


def load_or_fit(
    cli: AdvKNNCLI, trained: Trained, checkpoint: Path, seed: int, cache: StageCache, name: str
) -> Any:
    """The module with its trained weights: loaded, or trained from its configuration and kept.

    Args:
        cli: From `instantiate`.
        trained: What it was made of.
        checkpoint: Where its weights are or will be.
        seed: Of weights and shuffling.
        cache: Notes the wall time of its training; another run of the same training is waited for.
        name: What is trained.

    Raises:
        ValueError: If the checkpoint is damaged or of something else.
    """
    facts = checkpoint.with_suffix(".json")
    if not trained.checkpoint and not is_trained(checkpoint):
        with cache.lock(checkpoint, f"train {name}"):
            if not is_trained(checkpoint):  # by another run, meanwhile
                fit(cli, trained, checkpoint, seed)
    module: Any = cli.model
    load_weights(module, checkpoint, module.identity(cli.datamodule.name))
    if not trained.checkpoint:
        cache.note(str(checkpoint), f"train {name}", read_json(facts)["seconds"])
    return module


def is_trained(checkpoint: Path) -> bool:
    """Whether a training has ended: its checkpoint is there, with the facts beside it."""
    return checkpoint.is_file() and checkpoint.with_suffix(".json").is_file()


def training_settings(cli: AdvKNNCLI) -> dict[str, Any]:
    """What of a train.py configuration decides the outcome, as plain values.

    Not the device, though it rounds: what depends on a network has its weights in the key, so one trained on
    a GPU serves a laptop.
    """
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    defaults = cli.parser.get_defaults().trainer
    settings = {
        "seed_everything": config["seed_everything"],
        # A newer Lightning may know more arguments; only those that are set count.
        "trainer": {name: value for name, value in config["trainer"].items() if value != defaults.get(name)},
        "model": config["model"],
        "data": config["data"],
    }
    for part, places in _PLACES.items():
        arguments = settings[part].get("init_args", settings[part])
        decisive = {"backend", "index"} if arguments.get("backend") in APPROXIMATE else set()
        for place in (places - decisive) & set(arguments):
            del arguments[place]
    settings["trainer"]["callbacks"] = [
        callback
        for callback in settings["trainer"].get("callbacks") or []
        if not callback["class_path"].endswith("AttackEvaluation")
    ]
    code = _network_code(settings)
    return {**settings, "code": code} if code else settings


def _network_code(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """What tells a network that is not of this package from an edited one, by import path (`code_of`).

    Args:
        settings: As of `training_settings`.
    """
    network = settings["model"]["init_args"]["network"]
    paths = network["class_path"], network.get("init_args", {}).get("function")
    return {path: code_of(path) for path in paths if path and not path.startswith("lightning_advknn.")}


def _last_epoch(unfinished: Path) -> Path | None:
    """The checkpoint that an interrupted run goes on from; None if it left none that is whole.

    Others that this one does not know of are deleted: each attempt would write them again, under further names.
    """
    path = unfinished / "last.ckpt"
    known: set[str] = set()
    if path.is_file():
        try:
            states = read_checkpoint(path).get("callbacks", {}).values()
            known = {
                path.name,
                *(Path(best).name for each in states for best in each.get("best_k_models", ())),
            }
        except ValueError as error:
            warnings.warn(f"{error} Training starts over.", stacklevel=2)
    for other in unfinished.glob("*.ckpt"):
        if other.name not in known:
            other.unlink()
    return path if known else None


def _picker(cli: AdvKNNCLI, trained: Trained) -> ModelCheckpoint:
    """The callback that picks the epoch."""
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor:
            return callback
    raise ValueError(
        f"Expected {trained.config} to have a ModelCheckpoint with a `monitor` among `trainer.callbacks`: it picks"
        " the epoch."
    )
