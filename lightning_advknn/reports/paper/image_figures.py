"""Figures of images, laid out in inches so that they can be read in print."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_advknn.evaluation import Rows

_SMALL, _MIDDLE = 7, 9  # points
_LINE = 0.135  # inches from one line of small text to the next
_WRONG, _MARK = "#b2182b", "\N{BALLOT X}"
_LEGEND = f"{_MARK}: not the image's class"

_Line = tuple[str, bool]
"""Text, and whether it names a wrong class."""


class TrainingImages(Protocol):
    """Images by position, such as a tensor of them."""

    def __getitem__(self, position: int, /) -> Tensor:
        """``(channels, H, W)``, in [0, 1] or uint8."""


class Column(NamedTuple):
    """One column of `adversarials_figure`."""

    heading: str
    images: Tensor
    """``(n, channels, H, W)`` in [0, 1]."""
    rows: Rows
    """Their n rows; the columns after the attack are shown."""


def neighbours_figure(
    neighbours: Mapping[str, tuple[Tensor, Tensor]],
    layer: str,
    training: TrainingImages,
    pairs: tuple[Tensor, Tensor],
    rows: Rows,
    title: str,
) -> Figure:
    """Clean images and their adversarials, each with its nearest training images at each layer (Fig. 3).

    Args:
        neighbours: By layer, bank rows and labels of the nearest training images, int64 ``(2n, few)``: of
            the clean images first, then of the adversarials.
        layer: The kNN's.
        training: Training images in the bank's order.
        pairs: Clean images and their adversarials, ``(n, channels, H, W)`` in [0, 1] each.
        rows: Their n rows.
        title: Names the attack.
    """
    images, adversarial = pairs
    few = max(found.shape[1] for found, _ in neighbours.values())
    size, pitch, large = 0.5, 0.56, 0.9
    height = large + 0.3 + 0.69 * len(neighbours) + 0.2
    left = (0.75, 0.75 + few * pitch + 0.3)
    page = _Page(left[1] + few * pitch + 0.1, 0.55 + height * len(images))
    page.write([(f"{title}; {few} nearest training images at each layer", False)], 0.1, 0.1, _MIDDLE)
    page.write([(_LEGEND, False)], 0.1, 0.3)
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
        for position, (name, (found, labels)) in enumerate(neighbours.items()):
            upper = top + large + 0.22 + 0.69 * position
            page.write([(name, False), *([("(kNN's)", False)] if name == layer else [])], 0.1, upper + 0.15)
            for side, one in zip(left, (index, len(images) + index), strict=True):
                near = zip(found[one].tolist(), labels[one].tolist(), strict=True)
                for place, (row, told) in enumerate(near):
                    page.show(training[row], side + pitch * place, upper, size, (str(told), told != label))
    return page.figure


def adversarials_figure(columns: Sequence[Column], title: str) -> Figure:
    """Images under growing perturbations, one a row, each with the victims' verdicts (Fig. 6).

    Args:
        columns: The same images, clean and after attacks.
        title: Names the attacks.
    """
    size, pitch = 0.64, 0.76
    labels = columns[0].rows["label"]
    height = size + 3 * _LINE + 0.12
    page = _Page(max(0.75 + pitch * len(columns), 4.5), 0.85 + height * len(labels))
    page.write([(title, False)], 0.1, 0.1, _MIDDLE)
    page.write([(f"{_LEGEND}; on top: mean true L2 of all test images", False)], 0.1, 0.3)
    for place, (heading, images, rows) in enumerate(columns):
        left = 0.7 + pitch * place
        page.write([(line, False) for line in heading.splitlines()], left, 0.5)
        for index, image in enumerate(images):
            top = 0.8 + height * index
            if not place:
                page.write([(f"label {labels[index]}", False)], 0.1, top + 0.25)
            page.show(image, left, top, size)
            told = _verdicts(rows, "after", index)
            page.write([*told, (f"L2 {rows['l2'][index]:.2f}", False)], left, top + size + 0.04)
    return page.figure


class _Page:
    """A figure with parts placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.width, self.height = width, height

    def place(self, left: float, top: float, size: float, title: _Line = ("", False)) -> Axes:
        """Square axes without ticks; a wrong class in the title gets a mark, and the axes a thick frame."""
        box = (left / self.width, 1 - (top + size) / self.height, size / self.width, size / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        wrong = title[1]
        axes.set_title(_marked(title), fontsize=_SMALL, pad=2, color=_WRONG if wrong else "black")
        for spine in axes.spines.values():
            spine.set(linewidth=2 if wrong else 0.5, color=_WRONG if wrong else "gray")
        return axes

    def show(self, image: Tensor, left: float, top: float, size: float, title: _Line = ("", False)) -> None:
        """Show an image ``(channels, H, W)`` of uint8 or in [0, 1]."""
        pixels = image.permute(1, 2, 0).cpu().numpy()
        limit = 255 if image.dtype == torch.uint8 else 1
        self.place(left, top, size, title).imshow(pixels, cmap="gray", vmin=0, vmax=limit)

    def write(self, lines: Sequence[_Line], left: float, top: float, size: int = _SMALL) -> None:
        """Write lines of text."""
        for number, line in enumerate(lines):
            x, y = left / self.width, 1 - (top + _LINE * number) / self.height
            color = _WRONG if line[1] else "black"
            self.figure.text(x, y, _marked(line), fontsize=size, color=color, va="top")


def _marked(line: _Line) -> str:
    text, wrong = line
    return f"{text} {_MARK}" if wrong else text


def _verdicts(rows: Rows, when: str, index: int) -> list[_Line]:
    label = int(rows["label"][index])
    told = {name: int(rows[f"{victim}_{when}"][index]) for victim, name in (("knn", "kNN"), ("dknn", "DkNN"))}
    return [(f"{name} {predicted}", predicted != label) for name, predicted in told.items()]


def _told(rows: Rows, when: str, index: int) -> list[_Line]:
    return [
        (f"label {rows['label'][index]}", False),
        *_verdicts(rows, when, index),
        (f"credibility {rows[f'dknn_credibility_{when}'][index]:.2f}", False),
        *([(f"true L2 {rows['l2'][index]:.2f}", False)] if when == "after" else []),
    ]
