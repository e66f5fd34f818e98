"""What W&B shows of attacked images. The only file that imports wandb, and only once there is something to show."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_advknn.evaluation import Rows

_ENLARGED = 4  # a pixel's side in a panel: browsers blur small pictures


def use_epoch_axis(trainer: Trainer, names: Iterable[str]) -> None:
    """Draw what is logged under these names over epochs instead of steps; saying so again changes nothing."""
    for logger in _wandb_loggers(trainer):
        for name in names:
            # Each by its name: Lightning defines `*`, and W&B takes whichever matching pattern it meets first.
            logger.experiment.define_metric(name, step_metric="epoch")


def show_samples(
    trainer: Trainer, name: str, samples: Rows, layers: Sequence[str], panel_images: int
) -> None:
    """Log one attack's samples to all W&B loggers; every rank calls this.

    They get ``attack/<name>/samples`` (a table), ``attack/<name>/images`` (clean, adversarial and difference side by
    side) and ``attack/<name>/<column>_histogram`` of L2 and of the credibilities before and after.

    Args:
        trainer: Whose epoch is the place on the axis.
        name: The attack's name.
        samples: This rank's rows as in `evaluation.Rows`, with columns ``images`` and ``adversarial``, float32
            ``(n, channels, H, W)`` in [0, 1].
        layers: Names of the layers in the order of the rows' votes.
        panel_images: How many samples, those of the lowest ids, are shown as images.
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
            shows = _shows(dict(rows), layers, panel_images)
            named = {f"attack/{name}/{key}": value for key, value in shows.items()}
            use_epoch_axis(trainer, named)
            # No `step`: W&B drops what is behind the step that Lightning's own logs have reached.
            logger.experiment.log({"epoch": trainer.current_epoch, **named})
    trainer.strategy.barrier()


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _shows(rows: Rows, layers: Sequence[str], panel_images: int) -> dict[str, Any]:
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
        wandb.Image(enlarge(np.concatenate(pictures, axis=1)), caption=_caption(rows, sample))
        for sample, pictures in enumerate(shown)
    ]
    histograms = {
        f"{column}_histogram": wandb.Histogram(np_histogram=_histogram(column, values))
        for column, values in rows.items()
        if column == "l2" or "credibility" in column
    }
    data = list(zip(*table.values(), strict=True))
    return {"samples": wandb.Table(list(table), data), "images": panel, **histograms}


def pixels(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image ``(channels, H, W)`` in [0, 1] as uint8 ``(H, W, channels)``; W&B shows floats as black."""
    return (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()


def difference_pixels(image: Tensor, adversarial: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Their difference as uint8 ``(H, W, channels)``: grey (128) is none, black and white are the largest (Linf)."""
    difference = adversarial - image
    largest = difference.abs().max().clamp_min(torch.finfo(difference.dtype).tiny)
    return pixels((difference / largest + 1) / 2)


def enlarge(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Each pixel of ``(H, W, channels)`` as a square."""
    return picture.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)


def votes_text(votes: Tensor, layers: Sequence[str]) -> str:
    """Votes ``(L, C)`` in words, most votes first.

    >>> votes_text(torch.tensor([[0, 1, 4], [0, 0, 5]]), ["relu1", "relu2"])
    'relu1: 4 for 2, 1 for 1; relu2: 5 for 2'
    """
    return "; ".join(
        f"{layer}: " + ", ".join(f"{counts[c]} for {c}" for c in _most_first(counts))
        for layer, counts in zip(layers, votes.tolist(), strict=True)
    )


def _most_first(counts: list[int]) -> list[int]:
    voted = [label for label, count in enumerate(counts) if count]
    return sorted(voted, key=lambda label: -counts[label])


def _cells(values: Tensor, layers: Sequence[str]) -> list[Any]:
    if values.ndim == 1:
        return list(values.tolist())
    return [votes_text(votes, layers) for votes in values]


def _histogram(column: str, values: Tensor) -> Any:
    # Credibilities share their bins, so that before and after can be compared.
    return np.histogram(values.numpy(), bins=20, range=(0, 1) if "credibility" in column else None)


def _caption(rows: Rows, sample: int) -> str:
    changes = [
        f"{victim} {rows[f'{victim}_before'][sample]} to {rows[f'{victim}_after'][sample]}"
        for victim in ("dnn", "knn", "dknn", "surrogate")
        if f"{victim}_after" in rows
    ]
    return (
        f"clean, adversarial, difference of image {rows['id'][sample]}, label {rows['label'][sample]}:"
        f" {', '.join(changes)}; L2 {rows['l2'][sample]:.2f}, Linf {rows['linf'][sample]:.3f}"
    )
