"""How figures look in print: sizes of letters and lines, bands over seeds, legends, files."""

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_advknn.reports.render.means import Mean
from lightning_advknn.storage import atomic_path

P = ParamSpec("P")

WIDTH = 7.0  # inches: a double column


def for_print(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Give a figure letters and lines that are readable in a printed column."""
    style: Any = {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.5,
        "legend.frameon": False,
    }

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(style):
            return make(*args, **kwargs)

    return made


def draw_means(axes: Axes, points: Iterable[tuple[float, Mean]], **style: Any) -> None:
    """Draw a line through means, with a band of one standard deviation where there are several seeds."""
    points = sorted(points, key=lambda point: point[0])
    x, y = [x for x, _ in points], [mean.mean for _, mean in points]
    (line,) = axes.plot(x, y, **style)
    deviations = [mean.sd or 0.0 for _, mean in points]
    if any(deviations):
        low, high = ([v + sign * sd for v, sd in zip(y, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def legend_below(figure: Figure, columns: int) -> None:
    """Draw one legend below all panels, with each entry once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and PDF, each whole or not at all, and return where."""
    paths = []
    for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):  # equal results, equal files
        paths.append(path.with_name(path.name + suffix))
        with atomic_path(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=200, format=suffix[1:], metadata=metadata)
    return paths
