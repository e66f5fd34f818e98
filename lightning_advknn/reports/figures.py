"""Pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_advknn.classifiers import DkNNClassifier, KNNClassifier
from lightning_advknn.evaluation import Rows
from lightning_advknn.storage import atomic_path

NEIGHBOURS = 5


def neighbours_figure(
    dknn: DkNNClassifier,
    layer: str,
    bank_images: Tensor,
    images: Tensor,
    adversarial: Tensor,
    rows: Rows,
    title: str,
) -> Figure:
    """Clean image, adversarial and difference, each with its nearest training images and the victims' verdicts.

    Args:
        dknn: Whose bank is searched.
        layer: In which features.
        bank_images: Training images in the bank's order, ``(M, channels, H, W)`` in [0, 1] or uint8.
        images: Clean images ``(n, channels, H, W)`` in [0, 1].
        adversarial: Same shape.
        rows: Their n rows.
        title: Says which attack.
    """
    figure = Figure(figsize=(1.2 * (2 + NEIGHBOURS) + 1, 2.7 * len(images) + 0.5), layout="constrained")
    figure.suptitle(f"{title}\nright: nearest training images in {layer}", fontsize=10)
    grid = figure.subplots(2 * len(images), 2 + NEIGHBOURS, squeeze=False)
    for index in range(len(images)):
        pair = torch.stack([images[index], adversarial[index]])
        neighbours, labels = _neighbours(dknn, layer, pair)
        for row, when in enumerate(("before", "after")):
            axes = grid[2 * index + row]
            _show(axes[0], pair[row])
            axes[0].set_ylabel(_verdict(rows, when, index), fontsize=7, rotation=0, ha="right", va="center")
            for axis, neighbour, label in zip(axes[2:], neighbours[row], labels[row], strict=True):
                _show(axis, bank_images[neighbour])
                axis.set_title(f"label {label}", fontsize=7, pad=2)
        grid[2 * index, 1].axis("off")
        axis = grid[2 * index + 1, 1]
        difference = (adversarial[index] - images[index]).mean(0).cpu()
        limit = max(difference.abs().max().item(), 1e-6)
        axis.imshow(difference.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(f"difference, L2 {rows['l2'][index]:.2f}", fontsize=7, pad=2)
        axis.set(xticks=[], yticks=[])
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and PDF, each whole or not at all."""
    for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):  # equal results, equal files
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=200, format=suffix[1:], metadata=metadata)


@torch.no_grad()
def _neighbours(dknn: DkNNClassifier, layer: str, pair: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    position = dknn.layers.index(layer)
    bank = cast(KNNClassifier, dknn.knns[position]).bank
    features = dknn.network.features(pair.to(bank.features.device))[layer]
    _, indices = bank.search(features, NEIGHBOURS)
    return indices.tolist(), bank.labels[indices].tolist()


def _verdict(rows: Rows, when: str, index: int) -> str:
    name = f"clean, label {rows['label'][index]}" if when == "before" else "adversarial"
    return (
        f"{name}\nkNN {rows[f'knn_{when}'][index]}, DkNN {rows[f'dknn_{when}'][index]}\n"
        f"credibility {rows[f'dknn_credibility_{when}'][index]:.2f}"
    )


def _show(axis: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0).cpu().numpy()
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=255 if image.dtype == torch.uint8 else 1)
    axis.set(xticks=[], yticks=[])


def telling_rows(rows: Rows, n: int) -> Sequence[int]:
    """Positions of up to n samples, one a class first, that both victims got right and both get wrong."""
    label = rows["label"]
    right = (rows["knn_before"] == label) & (rows["dknn_before"] == label)
    wrong = (rows["knn_after"] != label) & (rows["dknn_after"] != label)
    fooled = (right & wrong).nonzero().squeeze(1).tolist() or list(range(len(label)))
    first_of_class = {int(label[position]): position for position in reversed(fooled)}
    chosen = sorted(first_of_class.values())
    return (chosen + [position for position in fooled if position not in chosen])[:n]
