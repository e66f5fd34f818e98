"""`AdvKNNCLI`: LightningCLI with this project's defaults."""

import os
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_advknn.callbacks import wandb_panels
from lightning_advknn.choices import WandbMode
from lightning_advknn.command_line import CommandParser
from lightning_advknn.data import ImageDataModule
from lightning_advknn.modules.checkpoint import AtomicCheckpointIO, read_checkpoint
from lightning_advknn.modules.checks import check_precision
from lightning_advknn.storage import versions

# Users can do nothing about these: Lightning 2.6 itself calls what jsonargparse 5 and torch 2.15 give up.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# The images are in memory as tensors: worker processes would only copy them.
warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
# The surrogate's backbone is frozen and in evaluation mode on purpose.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

_WANDB_RUN = "wandb_run"  # key under which a checkpoint names the W&B run that it belongs to


class _TrainingParser(CommandParser, LightningArgumentParser):
    """Lightning's, with configurations by name and suggestions for unknown names."""


class _LoggedConfig(SaveConfigCallback):
    """Saves the configuration beside the run and gives it to every logger, so dashboards can filter by it.

    Checkpoints name their W&B run, so that a training that goes on from one goes on in the same run.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the whole configuration as plain values, and versions."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": config, "versions": versions()})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Name the W&B run."""
        run = wandb_panels.run_id(trainer)
        if run is not None:
            checkpoint[_WANDB_RUN] = run


class AdvKNNCLI(LightningCLI):
    """Train, validate and test backbones and surrogates: ``train.py fit --config configs/mnist/backbone.yaml``.

    Args:
        args: Arguments instead of the command line's, as a list or a nested dict.
        run: False only instantiates model, data and trainer.
        parser_kwargs: Of the argument parser.
    """

    def __init__(
        self, args: Any = None, run: bool = True, parser_kwargs: dict[str, Any] | None = None
    ) -> None:
        self._going_on: Path | None = None  # folder of the checkpoint
        super().__init__(
            LightningModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_LoggedConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                # Lightning's own sampler repeats images to fill the last shard; the DataModules shard exactly.
                "use_distributed_sampler": False,
                # Exact search needs float64, which Apple's GPUs, Lightning's choice on a Mac, do not have.
                "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
            },
            auto_configure_optimizers=False,
            args=args,
            run=run,
            parser_kwargs=parser_kwargs,
            parser_class=_TrainingParser,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--wandb_mode``."""
        parser.add_argument(
            "--wandb_mode",
            choices=get_args(WandbMode),
            default="offline",
            help="What W&B does, unless WANDB_MODE is set. Offline runs are sent later by `wandb sync`.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse a list, a dict or the process's arguments; Lightning would warn that the first two hide the last."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Tell W&B its mode and place, and let a fit go on from a checkpoint in the run that wrote it.

        Raises:
            ValueError: If the checkpoint is damaged or unsafe.
        """
        config = self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config
        loggers = _arguments_of("WandbLogger", config["trainer"]["logger"])
        if loggers:
            # The environment is the only way that also allows artifacts.
            os.environ.setdefault("WANDB_MODE", config["wandb_mode"])
            wandb_panels.keep_artifacts_in(Path(loggers[0]["save_dir"] or "."))
        if self.subcommand == "fit" and config["ckpt_path"] is not None:
            self._going_on = _go_on(config, loggers)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, and have it write checkpoints whole or not at all, unless it has a plugin for them.

        Raises:
            ValueError: If it would not leave weights in float32.
        """
        trainer = super().instantiate_trainer(**kwargs)
        check_precision(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Put checkpoints beside the one that ``last`` stood for: so the best of all epochs stays the best."""
        if self._going_on:
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self._going_on)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyper-parameters overrule the command line and the config."""


def _go_on(config: Any, wandb_loggers: list[Any]) -> Path | None:
    """Complete a fit's configuration from the checkpoint that it goes on from.

    Lightning looks for ``last`` in the folder that this run is about to make. Here it is the newest
    ``last.ckpt`` of the configuration's earlier runs. If there is none, training starts afresh, as with
    Lightning.

    Returns:
        The folder that ``last`` was found in.
    """
    last = None
    if config["ckpt_path"] == "last":
        last = _newest_checkpoint(_arguments_of("CSVLogger", config["trainer"]["logger"]))
        if last is None:
            return None
        config["ckpt_path"] = str(last)
    path = Path(config["ckpt_path"])
    if wandb_loggers and path.is_file() and "WANDB_RUN_ID" not in os.environ:
        run = read_checkpoint(path).get(_WANDB_RUN)
        for arguments in wandb_loggers:
            arguments["id"] = arguments["id"] or run
    return last and last.parent


def _newest_checkpoint(csv_loggers: list[Any]) -> Path | None:
    found = [
        path
        for arguments in csv_loggers
        for path in Path(arguments["save_dir"], arguments["name"]).glob("*/checkpoints/last.ckpt")
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _arguments_of(name: str, objects: Any) -> list[Any]:
    """Arguments of the objects of a class that a configuration lists."""
    listed = objects if isinstance(objects, list) else [objects]
    return [
        one["init_args"]
        for one in listed
        if not isinstance(one, bool | None) and one["class_path"].endswith(f".{name}")
    ]
