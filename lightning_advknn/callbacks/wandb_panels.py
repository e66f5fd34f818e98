"""Panels for W&B. Only this file imports wandb, and only when it logs."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_advknn.callbacks.pictures import (
    caption,
    count,
    difference_pixels,
    draw_histograms,
    enlarge,
    pixels,
    votes_text,
)
from lightning_advknn.choices import WandbMode
from lightning_advknn.evaluation import Rows

Log = Callable[..., None]
"""``log(panels)``, or ``log(panels, axis)`` to plot them over one of them instead of steps."""


def use_axis(trainer: Trainer, names: Iterable[str], axis: str = "epoch") -> None:
    """Let W&B plot these metrics over epochs, or another axis, instead of steps."""
    for logger in _wandb_loggers(trainer):
        for name in names:
            # No pattern: Lightning defines `*`, and W&B uses any one that matches.
            logger.experiment.define_metric(name, step_metric=axis)


def run_id(trainer: Trainer) -> str | None:
    """The id of the W&B run that a trainer logs to; None without one."""
    ids = [logger.version for logger in _wandb_loggers(trainer)]
    return ids[0] if ids else None


def keep_artifacts_in(folder: Path) -> None:
    """Let W&B keep artifacts and tables of offline runs in a folder instead of the home directory.

    WANDB_DATA_DIR takes precedence.
    """
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))


def show_samples(
    trainer: Trainer, name: str, samples: Rows, layers: Sequence[str], panel_images: int
) -> None:
    """Log one attack's samples to all W&B loggers; every rank calls this.

    The panels are ``samples/<name>/table``, ``samples/<name>/images`` (clean, adversarial and difference),
    ``histograms/<name>/clean_and_adversarial`` (a picture), and W&B's own histograms
    ``histograms/<name>/<column>`` of L2 and of credibilities before and after.

    Args:
        trainer: The trainer, at this epoch.
        name: Name of the attack.
        samples: This rank's `evaluation.Rows`, with columns ``images`` and ``adversarial``, float32
            ``(n, channels, H, W)`` in [0, 1].
        layers: Names of the layers, in the order of votes.
        panel_images: Number of samples to show as images, by lowest id.
    """
    loggers = _wandb_loggers(trainer)
    if not loggers:
        return
    if trainer.world_size > 1:
        samples = {column: torch.cat(gather_all_tensors(values)) for column, values in samples.items()}
    if trainer.is_global_zero:
        order = samples["id"].argsort()
        rows = {column: values[order].cpu() for column, values in samples.items()}
        for logger in loggers:
            named = _shows(dict(rows), name, layers, panel_images)
            use_axis(trainer, named)
            # No `step`: W&B drops steps below that of Lightning's own logs.
            logger.experiment.log({"epoch": trainer.current_epoch, **named})
    trainer.strategy.barrier()


@contextmanager
def recorded(mode: WandbMode, project: str, folder: Path, **about: Any) -> Iterator[Log]:
    """A W&B run outside of training, on rank zero only; several may run at once.

    Yields a function that logs to it. Lists of dicts become tables, and paths become pictures.

    Args:
        mode: What W&B does. WANDB_MODE overrides it, unless it is ``disabled``.
        project: Name of the W&B project.
        folder: Folder for W&B's files, in ``wandb``.
        about: Other arguments of ``wandb.init``: ``name``, ``job_type``, ``group``, ``config``.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If the run cannot be started, for example without a login.
    """
    rank: int | None = getattr(rank_zero_only, "rank", None)
    if mode == "disabled" or rank:
        yield lambda *_: None
        return
    wandb = _import_wandb()
    keep_artifacts_in(folder)
    how = os.environ.get("WANDB_MODE", mode)
    try:
        run = wandb.init(project=project, dir=folder, mode=how, reinit="create_new", **about)
    except wandb.errors.Error as error:
        raise ValueError(
            f"Expected W&B to start a run ({how}), but it failed: {error} Log in with `wandb login`;"
            " `--wandb_mode offline` needs neither an account nor a network."
        ) from error
    with run:  # marks the run as failed after an error

        def log(panels: Mapping[str, Any], axis: str | None = None) -> None:
            for name in panels if axis else ():
                run.define_metric(name, step_metric=axis)
            run.log({key: _panel(wandb, value) for key, value in panels.items()})

        yield log


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "Expected wandb to be installed, but it is not. Run `pip install wandb`, or set `--wandb_mode"
            " disabled`."
        ) from error
    return wandb


def _panel(wandb: Any, value: Any) -> Any:
    if isinstance(value, Path):
        return wandb.Image(str(value))
    if isinstance(value, list):
        return wandb.Table(list(value[0]), [list(record.values()) for record in value])
    return value


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _shows(rows: Rows, name: str, layers: Sequence[str], panel_images: int) -> dict[str, Any]:
    import wandb

    images, adversarial = rows.pop("images"), rows.pop("adversarial")
    shown = [
        (pixels(clean), pixels(attacked), difference_pixels(clean, attacked))
        for clean, attacked in zip(images[:panel_images], adversarial[:panel_images], strict=True)
    ]
    table = {column: _cells(values, layers) for column, values in rows.items()}
    missing = [None] * (len(images) - len(shown))
    for place, column in enumerate(("clean", "adversarial", "difference")):
        table[column] = [wandb.Image(picture[place]) for picture in shown] + missing
    panel = [
        wandb.Image(enlarge(np.concatenate(pictures, axis=1)), caption=caption(rows, sample))
        for sample, pictures in enumerate(shown)
    ]
    histograms = {
        f"histograms/{name}/{column}": wandb.Histogram(np_histogram=count(column, values))
        for column, values in rows.items()
        if column == "l2" or "credibility" in column
    }
    return {
        f"samples/{name}/table": wandb.Table(list(table), list(zip(*table.values(), strict=True))),
        f"samples/{name}/images": panel,
        f"histograms/{name}/clean_and_adversarial": wandb.Image(draw_histograms(rows, name)),
        **histograms,
    }


def _cells(values: Tensor, layers: Sequence[str]) -> list[Any]:
    if values.ndim == 1:
        return list(values.tolist())
    return [votes_text(votes, layers) for votes in values]
