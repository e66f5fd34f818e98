"""Every attack's curve of accuracy against true L2."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_advknn.reports.leaderboards.attack_runs import CLEAN
from lightning_advknn.reports.leaderboards.board import Board
from lightning_advknn.reports.leaderboards.records import BOUND, WORST_CASE
from lightning_advknn.reports.render.means import Mean
from lightning_advknn.reports.render.style import WIDTH, draw_means, for_print, legend_below

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("s", "^", "D", "v", "P", "X")
_NAMED = 2 * len(_COLOURS)  # curves that can be told apart


@for_print
def board_figure(board: Board) -> Figure:
    """Accuracy of DkNN and the attacked kNN within growing budgets of true L2, a curve an entry.

    The worst case is black, the lower bound dotted red. The attacks that are strongest against either victim
    have colours, each for its strongest entry against the victim. Other curves are grey.
    """
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    victims = [victim for victim in board.victims if victim != "dnn"]
    named = _strongest_of_all(board, victims)[:_NAMED]
    grey: dict[str, Any] = {"color": "0.65", "linewidth": 0.7, "zorder": 1, "label": "other attacks"}
    # Drawn below the best attack, whose curve is often the same.
    black = {"color": "black", "linewidth": 3.5, "zorder": 2, "label": "worst case of all"}
    dotted = {"color": "red", "linestyle": ":", "zorder": 5, "label": "lower bound of any attack"}
    for axes, victim in zip(figure.subplots(1, 2, sharey=True), victims, strict=True):
        draw_means(axes, _curve(board, WORST_CASE, victim), **black)
        if board.places(BOUND, victim):
            draw_means(axes, _curve(board, BOUND, victim), **dotted)
        styles = {
            entry: _style(named.index(attack)) | {"label": attack}
            for attack, entry in _strongest(board, victim).items()
            if attack in named
        }
        # No bands over seeds: there are too many curves.
        for name in [*styles, *(other for other in board.ranked(victim) if other not in styles)]:
            curve = [(eps, value.mean) for eps, value in _curve(board, name, victim)]
            axes.plot(*zip(*curve, strict=True), **styles.get(name, grey))
        axes.set(
            title=board.victims[victim],
            xlabel=r"budget: true L2, $\Vert x' - x \Vert_2$ (pixels in [0, 1])",
            xlim=(-0.1, None),  # room for markers
            ylim=(-1.5, 101),
        )
    figure.axes[0].set_ylabel("accuracy within the budget (%)")
    legend_below(figure, 3)
    return figure


def _strongest(board: Board, victim: str) -> dict[str, str]:
    """By attack, the strongest first, its strongest entry."""
    best: dict[str, str] = {}
    for name in board.ranked(victim):
        best.setdefault(name.partition(",")[0], name)
    return best


def _strongest_of_all(board: Board, victims: Sequence[str]) -> list[str]:
    """Attacks by their best rank against any of these victims."""
    places = [list(_strongest(board, victim)) for victim in victims]
    return sorted(places[0], key=lambda attack: min(order.index(attack) for order in places))


def _curve(board: Board, name: str, victim: str) -> list[tuple[float, Mean]]:
    budgets = ((eps, board.value(name, victim, "accuracy", ("l2", eps))) for eps in board.radii("l2"))
    clean = board.value(CLEAN, victim, "accuracy", (None, 0.0))
    return [(eps, value) for eps, value in ((0.0, clean), *budgets) if value is not None]


def _style(position: int) -> dict[str, Any]:
    second, place = divmod(position, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "marker": _MARKERS[place],
        "linestyle": "--" if second else "-",
        "markerfacecolor": "white" if second else _COLOURS[place],
        "zorder": 4 - position / _NAMED,  # the strongest on top
    }
