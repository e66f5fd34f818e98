"""`AdvKNNCLI`: LightningCLI with this project's defaults."""

import os
import warnings
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_advknn.data import ImageDataModule

# Users can do nothing about these: Lightning 2.6 itself calls what jsonargparse 5 and torch 2.15 give up.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# The images are in memory as tensors: worker processes would only copy them.
warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
# The surrogate's backbone is frozen and in evaluation mode on purpose.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")


class LoggedConfig(SaveConfigCallback):
    """Saves the configuration beside the run and gives it to every logger, so dashboards can filter by it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the whole configuration as plain values."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": config})


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
        super().__init__(
            LightningModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=LoggedConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                # Lightning's own sampler repeats images to fill the last evaluation shard; the DataModules shard exactly.
                "use_distributed_sampler": False,
                # Exact search needs float64, which Apple's GPUs, Lightning's choice on a Mac, do not have.
                "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
            },
            auto_configure_optimizers=False,
            args=args,
            run=run,
            parser_kwargs=parser_kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--wandb_mode``."""
        parser.add_argument(
            "--wandb_mode",
            choices=("offline", "online", "disabled"),
            default="offline",
            help="What W&B does, unless WANDB_MODE is set. Offline runs are sent later by `wandb sync`.",
        )

    def before_instantiate_classes(self) -> None:
        """Pass on the W&B mode: the environment is the only way that also allows artifacts."""
        config = self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config
        os.environ.setdefault("WANDB_MODE", config["wandb_mode"])

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyper-parameters overrule the command line and the config."""
