"""Pictures, captions and histograms of attacked images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_advknn.evaluation import Rows

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 ``(H, W, channels)``."""

Counts = np.ndarray[Any, np.dtype[np.int64]]
Edges = np.ndarray[Any, np.dtype[np.float64]]

_ENLARGED = 4  # side of a pixel in a panel, as browsers blur small pictures
_CLEAN, _ADVERSARIAL, _FOOLS = "#0072B2", "#D55E00", "black"
_L2_BIN = 0.25


def pixels(image: Tensor) -> Picture:
    """An image ``(channels, H, W)`` in [0, 1] as uint8 ``(H, W, channels)``; W&B shows floats as black."""
    return (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()


def difference_pixels(image: Tensor, adversarial: Tensor) -> Picture:
    """The perturbation as uint8 ``(H, W, channels)``: grey (128) is 0, black and white are -Linf and Linf."""
    difference = adversarial - image
    largest = difference.abs().max().clamp_min(torch.finfo(difference.dtype).tiny)
    return pixels((difference / largest + 1) / 2)


def enlarge(picture: Picture) -> Picture:
    """Enlarge a picture ``(H, W, channels)``, each pixel to a square."""
    return picture.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)


def votes_text(votes: Tensor, layers: Sequence[str]) -> str:
    """Describe votes ``(L, C)``, most votes first.

    >>> votes_text(torch.tensor([[0, 1, 4], [0, 0, 5]]), ["relu1", "relu2"])
    'relu1: 4 for 2, 1 for 1; relu2: 5 for 2'
    """
    return "; ".join(
        f"{layer}: " + ", ".join(f"{counts[c]} for {c}" for c in _most_first(counts))
        for layer, counts in zip(layers, votes.tolist(), strict=True)
    )


def caption(rows: Rows, sample: int) -> str:
    """The caption of a sample's picture, with predictions before and after the attack."""
    changes = [
        f"{victim} {rows[f'{victim}_before'][sample]} to {rows[f'{victim}_after'][sample]}"
        for victim in ("dnn", "knn", "dknn", "surrogate")
        if f"{victim}_after" in rows
    ]
    return (
        f"clean, adversarial, difference of image {rows['id'][sample]}, label {rows['label'][sample]}:"
        f" {', '.join(changes)}; L2 {rows['l2'][sample]:.2f}, Linf {rows['linf'][sample]:.3f}"
    )


def count(column: str, values: Tensor) -> tuple[Counts, Edges]:
    """A histogram with the same bins for clean and adversarial images, all attacks and all epochs.

    Args:
        column: Column of `evaluation.Rows`: a credibility (20 bins), or ``l2`` (bins of 0.25).
        values: float ``(n,)``.

    Returns:
        Counts ``(bins,)`` and edges ``(bins + 1,)``.
    """
    if "credibility" in column:
        return np.histogram(values.numpy(), bins=20, range=(0, 1))
    bins = int(values.max() / _L2_BIN) + 1
    return np.histogram(values.numpy(), bins=bins, range=(0, bins * _L2_BIN))


def draw_histograms(rows: Rows, title: str) -> Picture:
    """Histograms of credibility, clean and adversarial, and of true L2, all and those that fool DkNN."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # it has no types
    *credibilities, distances = figure.subplots(1, 3)
    for axes, victim, name in zip(credibilities, ("knn", "dknn"), ("kNN", "DkNN"), strict=True):
        for when, label, colour in (("before", "clean", _CLEAN), ("after", "adversarial", _ADVERSARIAL)):
            column = f"{victim}_credibility_{when}"
            mean = rows[column].mean()
            axes.stairs(
                *count(column, rows[column]),
                fill=True,
                color=colour,
                alpha=0.5,
                label=f"{label}, mean {mean:.2f}",
            )
        axes.set(xlabel=f"credibility of {name}", xlim=(0, 1))
    counts, edges = count("l2", rows["l2"])
    axes = distances
    axes.stairs(counts, edges, fill=True, color=_ADVERSARIAL, alpha=0.5, label="all adversarials")
    fools = rows["l2"][rows["dknn_after"] != rows["label"]]
    axes.stairs(np.histogram(fools.numpy(), edges)[0], edges, color=_FOOLS, label="DkNN gets wrong")
    axes.set(xlabel="true L2 from the clean image (pixels in [0, 1])", xlim=(0, edges[-1]))
    credibilities[0].set_ylabel("images")
    for axes in figure.axes:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.35)  # room for the legend
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}, {len(rows['l2'])} images", fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _most_first(counts: list[int]) -> list[int]:
    voted = [label for label, votes in enumerate(counts) if votes]
    return sorted(voted, key=lambda label: -counts[label])
