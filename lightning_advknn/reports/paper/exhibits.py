"""Tables and figures of each part of a grid, with the numbers of the figures."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lightning_advknn.reports.paper import curves
from lightning_advknn.reports.paper.credibility import (
    attacked_method,
    distributions,
    filter_sentence,
    filter_table,
)
from lightning_advknn.reports.paper.curve_areas import fit_sentence, ranking, strongest_at, weight_sentence
from lightning_advknn.reports.paper.tables import attacked_table, series_table, transfer_table
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.names import KIND_TITLES, VICTIM_TITLES
from lightning_advknn.reports.records.over_seeds import Measurement, Results
from lightning_advknn.reports.render.blocks import Block, Illustration, Lines, Table
from lightning_advknn.reports.render.style import save_figure
from lightning_advknn.storage import atomic_path


@dataclass(frozen=True)
class Exhibits:
    """Blocks of a page from the results of one data set and part. Figures are written at once.

    Args:
        output: Folder of the figures.
    """

    output: Path

    def attacked(self, found: list[Results]) -> list[Block]:
        """Table 2 of each experiment."""
        return [attacked_table(each) for each in found]

    def transferred(self, found: list[Results]) -> list[Block]:
        """Table 3 of each experiment and transfer network."""
        blocks: list[Block] = []
        for each in found:
            tables = [transfer_table(each, network) for network in each.networks]
            blocks += tables or [f"{each.name} has no Table 3."]
        return blocks

    def neighbours(self, found: list[Results]) -> list[Block]:
        """Figure 3, which each experiment left."""
        caption = (
            "Clean images and their adversarials with the five nearest training images and the victims'"
            " verdicts"
        )
        return [self._copied(each, "neighbours", caption) for each in found]

    def layers(self, found: list[Results]) -> list[Block]:
        """Figure 4: curves, ranking, numbers."""
        blocks: list[Block] = []
        for each in found:
            caption = (
                f"Figure 4, {each.title}: accuracy of kNN and DkNN against mean true L2 of all images under"
                " BIM at growing eps, through the backbone (Origin) and through surrogates on each layer."
            )
            blocks.append(self._picture(f"{each.data}-layers", curves.layers_figure(each), caption, [each]))
            blocks += filter(None, [_published_sentence(each)])
            blocks.append(_ranking_table(each))
            points = sorted(each.measurements(), key=lambda one: one.eps)
            series = ((one.method.label, _eps(one.eps), one) for one in points)
            blocks.append(series_table(f"Numbers of Figure 4, {each.title}", "method", series, [each]))
        return blocks

    def credibility(self, found: list[Results]) -> list[Block]:
        """Figure 5: cumulative distributions, and what thresholds filter."""
        blocks: list[Block] = []
        for each in found:
            distributed, method = distributions(each), attacked_method(each)
            if not distributed or method is None:
                blocks.append(
                    f"{each.name} has no credibility of a surrogate with consistency learning on the kNN's"
                    " layer."
                )
                continue
            figure = curves.credibility_figure(distributed, each.victim["convention"])
            caption = (
                f"Figure 5, {each.title}: share of images whose DkNN credibility is below a threshold, clean"
                f" and under attacks through {method.label}; seeds together."
            )
            blocks.append(self._picture(f"{each.data}-credibility", figure, caption, [each]))
            blocks += filter(None, [filter_sentence(each, distributed)])
            blocks.append(filter_table(each, distributed))
        return blocks

    def adversarials(self, found: list[Results]) -> list[Block]:
        """Figure 6, which each experiment left."""
        return [self._copied(each, "adversarials", "Adversarials under growing eps") for each in found]

    def growing_k(self, found: list[Results]) -> list[Block]:
        """Figure 7: curves and numbers."""
        title = found[0].title
        caption = f"Figure 7, {title}: success of attacks against kNN and DkNN with k neighbours."
        figure = curves.growing_k_figure(found)
        ordered = sorted(found, key=lambda each: each.victim["k"])
        series = (
            (_attack_through(one), f"k = {each.victim['k']}", one)
            for each in ordered
            for one in each.measurements()
            if not one.clean or one.method.kind == "origin"
        )
        return [
            self._picture(f"{found[0].data}-k", figure, caption, found),
            series_table(
                f"Numbers of Figure 7 (success is 100 - accuracy), {title}", "attack", series, found
            ),
        ]

    def weights(self, found: list[Results]) -> list[Block]:
        """The sweep of lambda: curves and numbers."""
        title = found[0].title
        caption = (
            f"{title}: accuracy under attack against lambda, the weight of L_CLS in Eq. (16); .3 in the"
            " paper."
        )
        measured = sorted(
            (one for each in found for one in each.attacked()),
            key=lambda one: (
                one.method.kind != "origin",
                one.method.kind == "dknnb",
                one.method.cls_weight or 0,
            ),
        )
        series = ((one.function.upper(), _weight(one), one) for one in measured)
        return [
            self._picture(f"{found[0].data}-lambda", curves.weights_figure(found), caption, found),
            weight_sentence(found),
            series_table(f"Numbers of the sweep, {title}", "attack", series, found),
        ]

    def eps(self, found: list[Results]) -> list[Block]:
        """The sweep of eps: curves, the eps that fits the paper's row, numbers."""
        blocks: list[Block] = []
        for each in found:
            caption = f"{each.title}: accuracy against eps; level lines are the paper's cells of Table 2."
            blocks.append(self._picture(f"{each.data}-eps", curves.eps_figure(each), caption, [each]))
            blocks += filter(None, [fit_sentence(each)])
            points = sorted(each.attacked(), key=lambda one: one.eps)
            series = ((_attack_through(one), _eps(one.eps), one) for one in points)
            blocks.append(series_table(f"Numbers of the sweep, {each.title}", "attack", series, [each]))
        return blocks

    def _picture(self, name: str, figure: Figure, caption: str, sources: Sequence[Results]) -> Illustration:
        save_figure(figure, self.output / name)
        axes = [axis for axis in figure.axes if axis.lines]
        lines = dict.fromkeys(label for axis in axes for label in axis.get_legend_handles_labels()[1])
        alt = f"Line chart. {caption} Lines: {'; '.join(lines)}. The table of numbers is below."
        return self._shown(name, caption, alt, sources)

    def _copied(self, results: Results, name: str, caption: str) -> str | Illustration:
        if not (results.folder / f"{name}.png").is_file():
            return f"{results.name} has no picture `{name}.png`."
        copy = f"{results.data}-{name}"
        for suffix in (".png", ".pdf"):
            with atomic_path(self.output / f"{copy}{suffix}") as temporary:
                shutil.copyfile(results.folder / f"{name}{suffix}", temporary)
        text = f"{results.title}: {caption}."
        return self._shown(copy, text, f"Pictures. {text}", [results])

    def _shown(self, name: str, caption: str, alt: str, sources: Sequence[Results]) -> Illustration:
        return Illustration.of_file(self.output / name, caption, alt, [each.name for each in sources])


def _published_sentence(results: Results) -> str:
    """The published points of Figure 4 in one unit, and our accuracy at Sitawarin & Wagner's L2."""
    if results.dataset != "MNIST":
        return ""
    (their_accuracy, their_l2), (_, own_l2) = published.SITAWARIN_WAGNER, published.OWN_POINT
    text = (
        "Published points stand at their true L2. The paper draws its own curves in its code's unit (L2 x"
        f" 255 / 784) but the point of Sitawarin & Wagner, a true L2, on the same axis as it is: {own_l2}"
        f" beside {their_l2}. In one unit it is {published.true_l2(own_l2):.2f} beside {their_l2}."
    )
    strongest = strongest_at(results, "dknn", their_l2)
    if strongest is None:
        return f"{text} No curve here reaches that far."
    method, accuracy = strongest
    return (
        f"{text} Here DkNN is at {accuracy:.2f} % at {their_l2}, through {method.label}, the strongest"
        f" there; it is at {their_accuracy} % in theirs."
    )


def _ranking_table(results: Results) -> Table:
    rows: list[list[Lines]] = []
    for victim in ("knn", "dknn"):
        ranks, end = ranking(results, victim)
        for position, rank in enumerate(ranks, 1):
            half = "never" if rank.half is None else f"{rank.half:.2f}"
            rows.append(
                [
                    (VICTIM_TITLES[victim],),
                    (str(position),),
                    (rank.method.label,),
                    (f"{rank.area:.2f}",),
                    (half,),
                ]
            )
    return Table(
        f"{results.title}: methods from the strongest to the weakest, by their mean accuracy over true L2"
        f" from 0 to {end:.2f} (area under the curve over its width), which all of them reach.",
        ["victim", "rank", "method", "mean accuracy, %", "true L2 at 50 % accuracy"],
        rows,
        headings=3,
        sources=[results.name],
    )


def _attack_through(one: Measurement) -> str:
    return "clean" if one.clean else f"{one.function.upper()}, {KIND_TITLES[one.method.kind]}"


def _weight(one: Measurement) -> str:
    if one.method.kind == "dknnb_cl":
        return f"lambda {one.method.cls_weight:g}"
    return "L_CLS alone" if one.method.kind == "dknnb" else KIND_TITLES[one.method.kind]


def _eps(eps: float) -> str:
    return f"eps {eps:g}" if eps else "clean"
