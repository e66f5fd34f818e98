"""Figures of images, laid out in inches so that they can be read in print."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_advknn.classifiers import DkNN
from lightning_advknn.data.files import ImageFiles
from lightning_advknn.evaluation import Rows

NEIGHBOURS = 5

SMALL, MIDDLE = 7, 9  # points
LINE = 0.135  # inches from one line of small text to the next
WRONG, MARK = "#b2182b", "\N{BALLOT X}"
LEGEND = f"{MARK}: not the image's class"

Line = tuple[str, bool]
"""Text, and whether what it tells is wrong."""


class Column(NamedTuple):
    """One column of `adversarials_figure`."""

    heading: str
    images: Tensor
    """``(n, channels, H, W)`` in [0, 1]."""
    rows: Rows
    """Their n rows; those after the attack count."""


def neighbours_figure(
    dknn: DkNN,
    layer: str,
    bank_images: Tensor | ImageFiles,
    images: Tensor,
    adversarial: Tensor,
    rows: Rows,
    title: str,
) -> Figure:
    """Clean images and their adversarials, each with its nearest training images at each layer (Fig. 3).

    Args:
        dknn: Whose banks are searched.
        layer: The kNN's.
        bank_images: Training images in the bank's order, ``(M, channels, H, W)`` in [0, 1] or uint8, or files of them.
        images: Clean images ``(n, channels, H, W)`` in [0, 1].
        adversarial: Same shape.
        rows: Their n rows.
        title: Says which attack.
    """
    size, pitch, large = 0.5, 0.56, 0.9
    height = large + 0.3 + 0.69 * len(dknn.layers) + 0.2
    left = (0.75, 0.75 + NEIGHBOURS * pitch + 0.3)
    page = _Page(left[1] + NEIGHBOURS * pitch + 0.1, 0.55 + height * len(images))
    page.write([(f"{title}; {NEIGHBOURS} nearest training images at each layer", False)], 0.1, 0.1, MIDDLE)
    page.write([(LEGEND, False)], 0.1, 0.3)
    for index in range(len(images)):
        top = 0.7 + height * index
        label = int(rows["label"][index])
        pair = torch.stack([images[index], adversarial[index]])
        page.show(pair[0], left[0], top, large, ("clean", False))
        page.write(_told(rows, "before", index), left[0] + large + 0.08, top + 0.1)
        difference = (pair[1] - pair[0]).mean(0).cpu()
        limit = max(difference.abs().max().item(), 1e-6)
        axes = page.place(left[1] - 0.3 - large, top, large, ("difference", False))
        axes.imshow(difference.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        page.show(pair[1], left[1], top, large, ("adversarial", False))
        page.write(_told(rows, "after", index), left[1] + large + 0.08, top + 0.1)
        for position, (name, found) in enumerate(_neighbours(dknn, pair).items()):
            upper = top + large + 0.22 + 0.69 * position
            page.write([(name, False), *([("(kNN's)", False)] if name == layer else [])], 0.1, upper + 0.15)
            for side, indices, labels in zip(left, *found, strict=True):
                for place, (row, told) in enumerate(zip(indices, labels, strict=True)):
                    page.show(bank_images[row], side + pitch * place, upper, size, (str(told), told != label))
    return page.figure


def adversarials_figure(columns: Sequence[Column], title: str) -> Figure:
    """Images under growing perturbations, one a row, each with the victims' verdicts (Fig. 6).

    Args:
        columns: The same images as they are and as attacks leave them.
        title: Says which attacks.
    """
    size, pitch = 0.64, 0.76
    labels = columns[0].rows["label"]
    height = size + 3 * LINE + 0.12
    page = _Page(max(0.75 + pitch * len(columns), 4.5), 0.85 + height * len(labels))
    page.write([(title, False)], 0.1, 0.1, MIDDLE)
    page.write([(f"{LEGEND}; on top: mean true L2 of all test images", False)], 0.1, 0.3)
    for place, (heading, images, rows) in enumerate(columns):
        left = 0.7 + pitch * place
        page.write([(line, False) for line in heading.splitlines()], left, 0.5)
        for index, image in enumerate(images):
            top = 0.8 + height * index
            if not place:
                page.write([(f"label {labels[index]}", False)], 0.1, top + 0.25)
            page.show(image, left, top, size)
            told = _victims(rows, "after", index)
            page.write([*told, (f"L2 {rows['l2'][index]:.2f}", False)], left, top + size + 0.04)
    return page.figure


class _Page:
    """A figure whose parts are placed by inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.width, self.height = width, height

    def place(self, left: float, top: float, size: float, title: Line = ("", False)) -> Axes:
        """Square axes without ticks; if what the title tells is wrong, it gets a mark and the axes a thick frame."""
        box = (left / self.width, 1 - (top + size) / self.height, size / self.width, size / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        wrong = title[1]
        axes.set_title(_marked(title), fontsize=SMALL, pad=2, color=WRONG if wrong else "black")
        for spine in axes.spines.values():
            spine.set(linewidth=2 if wrong else 0.5, color=WRONG if wrong else "gray")
        return axes

    def show(self, image: Tensor, left: float, top: float, size: float, title: Line = ("", False)) -> None:
        """An image ``(channels, H, W)`` of uint8 or in [0, 1]."""
        pixels = image.permute(1, 2, 0).cpu().numpy()
        limit = 255 if image.dtype == torch.uint8 else 1
        self.place(left, top, size, title).imshow(pixels, cmap="gray", vmin=0, vmax=limit)

    def write(self, lines: Sequence[Line], left: float, top: float, size: int = SMALL) -> None:
        """Lines of text."""
        for number, line in enumerate(lines):
            x, y = left / self.width, 1 - (top + LINE * number) / self.height
            color = WRONG if line[1] else "black"
            self.figure.text(x, y, _marked(line), fontsize=size, color=color, va="top")


def _marked(line: Line) -> str:
    text, wrong = line
    return f"{text} {MARK}" if wrong else text


@torch.no_grad()
def _neighbours(dknn: DkNN, pair: Tensor) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """For each layer, rows in the bank and labels of each image's nearest training images in its features."""
    features = dknn.network.features(pair.to(dknn.calibration_votes.device))
    found = {}
    for layer, bank in dknn.banks.items():
        _, indices = bank.search(features[layer], NEIGHBOURS)
        found[layer] = indices.tolist(), bank.labels[indices].tolist()
    return found


def _victims(rows: Rows, when: str, index: int) -> list[Line]:
    label = int(rows["label"][index])
    told = {name: int(rows[f"{victim}_{when}"][index]) for victim, name in (("knn", "kNN"), ("dknn", "DkNN"))}
    return [(f"{name} {predicted}", predicted != label) for name, predicted in told.items()]


def _told(rows: Rows, when: str, index: int) -> list[Line]:
    return [
        (f"label {rows['label'][index]}", False),
        *_victims(rows, when, index),
        (f"credibility {rows[f'dknn_credibility_{when}'][index]:.2f}", False),
        *([(f"true L2 {rows['l2'][index]:.2f}", False)] if when == "after" else []),
    ]
