"""Figures 4, 5 and 7 and the sweeps of lambda and eps."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_advknn.reports.paper.credibility import Distribution
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.grouping import grouped
from lightning_advknn.reports.records.names import KIND_TITLES, VICTIM_TITLES
from lightning_advknn.reports.records.over_seeds import Measurement, Results
from lightning_advknn.reports.render.means import Mean
from lightning_advknn.reports.render.style import WIDTH, draw_means, for_print, legend_below

# Okabe-Ito colours, and markers: they survive print and colour blindness.
_LAYER_STYLES = (("#E69F00", "v"), ("#009E73", "s"), ("#0072B2", "^"), ("#CC79A7", "D"), ("#56B4E9", "P"))
_KIND_STYLES: dict[str, dict[str, Any]] = {
    "origin": {"color": "black", "marker": "o"},
    "dknnb": {"color": "#0072B2", "marker": "s"},
    "dknnb_cl": {"color": "#D55E00", "marker": "^"},
}
_FUNCTION_STYLES: dict[str, dict[str, Any]] = {
    "fgsm": {"linestyle": "--", "markerfacecolor": "white"},
    "bim": {"linestyle": "-"},
}
_L2_LABEL = r"mean true L2, $\Vert x' - x \Vert_2$ (pixels in [0, 1])"
_EPS_LABEL = "eps: largest change of a pixel (pixels in [0, 1])"


@for_print
def layers_figure(results: Results) -> Figure:
    """Accuracy against mean true L2 under BIM at growing eps, one line a surrogate (Figure 4)."""
    figure, panels = _two_panels(3.6)
    order = [*results.layers, None]  # the backbone last, on top
    methods = sorted(results.methods.values(), key=lambda method: (order.index(method.layer), method.kind))
    for victim, axes in panels.items():
        for method in methods:
            style = (
                dict(_KIND_STYLES["origin"]) if method.layer is None else _layer_style(results, method.layer)
            )
            if method.kind == "dknnb":
                style |= {"linestyle": "--", "markerfacecolor": "white"}
            points = [
                (each.l2.mean, each.accuracy)
                for each in results.measurements()
                if (each.victim, each.method) == (victim, method) and each.function in ("clean", "bim")
            ]
            draw_means(axes, points, label=method.label, **style)
        axes.set(xlabel=_L2_LABEL, xlim=(0, None))
        if results.dataset == "MNIST":  # the unit is that of 28 x 28 images
            there_and_back: Any = (lambda l2: l2 * 255 / 784, published.true_l2)
            unit = axes.secondary_xaxis("top", functions=there_and_back)
            unit.set_xlabel("unit of the paper's figures: L2 x 255 / 784")
    if results.dataset == "MNIST":
        _published_points(panels["dknn"])
    legend_below(figure, 5)
    return figure


@for_print
def credibility_figure(found: Sequence[Distribution], convention: str) -> Figure:
    """Share of images that each threshold of credibility filters (Figure 5): of all, and of successes."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    distortions = sorted({each.l2 for each in found if each.l2 > 0})
    colours = mpl.colormaps["viridis"]
    for axes, successes in ((left, False), (right, True)):
        for each in found:
            if each.l2 > 0 and each.successes != successes:
                continue
            values = [0.0, *each.counts, 1.0]
            shares = [each.below(value) for value in values]
            if each.l2 > 0:
                position = distortions.index(each.l2)
                style = {
                    "color": colours(0.9 * position / max(len(distortions) - 1, 1)),
                    "marker": "osD^vPX*"[position % 8],
                    "label": f"{each.label}: L2 {each.l2:.2f}",
                }
            else:
                style = {"color": "black", "linestyle": "--", "label": "clean"}
            # Credibility takes few values: a step just after each.
            axes.plot(values, shares, drawstyle="steps-pre", markevery=0.12, **style)
        axes.set(
            title="adversarials that DkNN gets wrong" if successes else "all adversarials",
            xlabel=f"threshold of credibility (share of calibration images)\nconvention: {convention}",
            xlim=(0, 1),
            ylim=(0, 101),
        )
    left.set_ylabel("images below the threshold (%)")
    legend_below(figure, 4)
    return figure


@for_print
def growing_k_figure(found: Sequence[Results]) -> Figure:
    """Attack success against k (Figure 7), one line an attack and method."""
    figure, panels = _two_panels(3.3)
    ks = sorted({results.victim["k"] for results in found})
    for victim, axes in panels.items():
        own = [(results.victim["k"], each) for results in found for each in results.attacked()]
        lines = grouped(
            (one for one in own if one[1].victim == victim),
            lambda one: (one[1].function, one[1].method.kind),
        )
        for (function, kind), cells in lines.items():
            points = [(k, Mean(tuple(100 - value for value in each.accuracy.values))) for k, each in cells]
            style = _KIND_STYLES[kind] | _FUNCTION_STYLES.get(function, {})
            draw_means(axes, points, label=f"{function.upper()}, {KIND_TITLES[kind]}", **style)
        axes.set(xscale="log", xlabel="k (neighbours that vote, log scale)", title=VICTIM_TITLES[victim])
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
    panels["knn"].set_ylabel("attack success, 100 - accuracy (%)")
    legend_below(figure, 3)
    return figure


@for_print
def weights_figure(found: Sequence[Results]) -> Figure:
    """Accuracy against lambda of Eq. (16), a panel an attack and victim.

    Origin and L_CLS alone are level lines.
    """
    measured = [each for results in found for each in results.measurements()]
    weights = sorted({each.method.cls_weight or 0.0 for each in measured if each.method.kind == "dknnb_cl"})
    figure, panels = _attacks_and_victims(measured)
    for (function, victim), axes in panels.items():
        own = [each for each in measured if (each.function, each.victim) == (function, victim)]
        points = [
            (each.method.cls_weight or 0.0, each.accuracy) for each in own if each.method.kind == "dknnb_cl"
        ]
        draw_means(axes, points, label=KIND_TITLES["dknnb_cl"], **_KIND_STYLES["dknnb_cl"])
        levels = {each.method.kind: each.accuracy.mean for each in reversed(own)}
        for kind, name in (("dknnb", r"DkNNB ($L_{CLS}$ alone)"), ("origin", "Origin")):
            if kind in levels:
                style = {"color": _KIND_STYLES[kind]["color"], "linestyle": "--" if kind == "dknnb" else ":"}
                axes.axhline(levels[kind], label=name, **style)
        # Linear from 0 to the smallest weight, logarithmic from there on.
        least = min((weight for weight in weights if weight > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.set_xticks(weights, [f"{weight:g}" for weight in weights])
        axes.minorticks_off()
        axes.set(
            xlim=(-least / 4, max(weights) * 1.4),
            xlabel=r"$\lambda$: weight of $L_{CLS}$ beside $L_{CL}$ (no unit, log scale)",
        )
        axes.label_outer()
    for axes in panels.values():
        axes.set_ylim(bottom=0)  # after all panels of a row, which share it, are drawn
    legend_below(figure, 3)
    return figure


@for_print
def eps_figure(results: Results) -> Figure:
    """Accuracy against eps, a panel an attack and victim. The paper's cells of Table 2 are level lines."""
    found = results.measurements()
    figure, panels = _attacks_and_victims(found)
    for (function, victim), axes in panels.items():
        for method in results.methods.values():
            points = [
                (each.eps, each.accuracy)
                for each in found
                if (each.victim, each.method) == (victim, method) and each.function in ("clean", function)
            ]
            style = _KIND_STYLES[method.kind]
            draw_means(axes, points, label=KIND_TITLES[method.kind], **style)
            theirs = published.accuracy_at_any_settings(results.dataset, victim, method.kind, function)
            if theirs is not None:
                label = f"{KIND_TITLES[method.kind]}, the paper's"
                axes.axhline(theirs, color=style["color"], linestyle="--", linewidth=0.9, label=label)
        axes.set(ylim=(0, 101), xlim=(0, None), xlabel=_EPS_LABEL)
        axes.label_outer()
    legend_below(figure, 3)
    return figure


def _attacks_and_victims(found: Sequence[Measurement]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A row of panels for each attack function, a column for each victim."""
    functions = list(dict.fromkeys(each.function for each in found if not each.clean))
    figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * len(functions)), layout="constrained")
    grid = figure.subplots(len(functions), 2, sharex=True, sharey="row", squeeze=False)
    panels = {}
    for row, function in zip(grid, functions, strict=True):
        row[0].set_ylabel("accuracy (%)")
        for axes, victim in zip(row, ("knn", "dknn"), strict=True):
            axes.set_title(f"{VICTIM_TITLES[victim]}, {function.upper()}")
            panels[function, victim] = axes
    return figure, panels


def _two_panels(height: float) -> tuple[Figure, dict[str, Axes]]:
    """Two panels side by side, of kNN and DkNN."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = dict(zip(("knn", "dknn"), figure.subplots(1, 2, sharey=True), strict=True))
    for victim, axes in panels.items():
        axes.set_title(VICTIM_TITLES[victim])
    panels["knn"].set_ylabel("accuracy (%)")
    return figure, panels


def _layer_style(results: Results, layer: str) -> dict[str, Any]:
    colour, marker = _LAYER_STYLES[results.layers.index(layer) % len(_LAYER_STYLES)]
    return {"color": colour, "marker": marker}


def _published_points(axes: Axes) -> None:
    """Mark the two results that the paper compares, each at its true L2, with its own unit beside."""
    (their_accuracy, their_l2), (accuracy, l2) = published.SITAWARIN_WAGNER, published.OWN_POINT
    true = published.true_l2(l2)
    for x, y, text, at, marker in (
        (
            their_l2,
            their_accuracy,
            f"Sitawarin &\nWagner 2019:\n{their_accuracy} % at\n{their_l2} (true L2)",
            (0.7, 0.99),
            "P",
        ),
        (
            true,
            accuracy,
            f"AdvKNN paper:\n{accuracy} % at {l2}\n(its own unit;\ntrue L2 {true:.2f})",
            (0.99, 0.99),
            "*",
        ),
    ):
        axes.plot(x, y, color="#F0E442", markeredgecolor="black", markersize=9, marker=marker)
        arrow = {"arrowstyle": "-", "linewidth": 0.6, "shrinkB": 4, "relpos": (0.5, 0)}
        axes.annotate(
            text, (x, y), at, textcoords="axes fraction", fontsize=7, ha="right", va="top", arrowprops=arrow
        )
