"""Rankings from curves: the strongest surrogate, the eps and the lambda that fit best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_advknn.reports.records.grouping import grouped, pivoted
from lightning_advknn.reports.records.names import VICTIM_TITLES
from lightning_advknn.reports.records.over_seeds import Measurement, Method, Results
from lightning_advknn.reports.records.published import accuracy_at_any_settings

_Curve = list[tuple[float, float]]
"""Points of growing true L2 and accuracy in %."""


@dataclass(frozen=True)
class Rank:
    """A curve of Figure 4 in one victim's ranking.

    Args:
        method: What was attacked.
        area: Mean accuracy in % over true L2 from 0 to the largest that all curves reach.
        half: True L2 at which accuracy first falls to 50 %; None if it never does.
    """

    method: Method
    area: float
    half: float | None


def ranking(results: Results, victim: str) -> tuple[list[Rank], float]:
    """Methods from the strongest to the weakest against a victim, by the area under their curve, and its end.

    Args:
        results: BIM at several eps through each method.
        victim: ``knn`` or ``dknn``.
    """
    curves = {method: _curve(results, victim, method) for method in results.methods.values()}
    curves = {method: points for method, points in curves.items() if points and points[-1][0] > 0}
    end = min((points[-1][0] for points in curves.values()), default=0.0)
    ranks = [Rank(method, _area(points, end) / end, _half(points)) for method, points in curves.items()]
    return sorted(ranks, key=lambda rank: rank.area), end


def _curve(results: Results, victim: str, method: Method) -> _Curve:
    """Accuracy in % over mean true L2 under BIM at growing eps, from clean images on."""
    return sorted(
        (each.l2.mean, each.accuracy.mean)
        for each in results.measurements()
        if each.victim == victim and each.method == method and each.function in ("clean", "bim")
    )


def strongest_at(results: Results, victim: str, l2: float) -> tuple[Method, float] | None:
    """The strongest method against a victim at a true L2, and its accuracy in %, interpolated between points.

    None if no curve reaches that far.
    """
    found = []
    for method in results.methods.values():
        for (x0, y0), (x1, y1) in pairwise(_curve(results, victim, method)):
            if x0 <= l2 <= x1 and x0 < x1:
                found.append((method, y0 + (y1 - y0) * (l2 - x0) / (x1 - x0)))
    return min(found, key=_second, default=None)


def _fits(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Distance of each eps from the paper's row of Table 2, nearest first.

    Returns:
        For each attack, eps and the root mean square of the differences in points over the row's cells
        (victims x methods). Only eps with all cells that the others have.
    """
    differences = [
        (each.function, each.eps, each.accuracy.mean - theirs)
        for each in results.attacked()
        if (theirs := _papers(results, each)) is not None
    ]
    found = {}
    for function, by_eps in pivoted(differences, row=lambda one: one[0], column=lambda one: one[1]).items():
        most = max(map(len, by_eps.values()))
        ranks = [
            (eps, math.sqrt(sum(difference * difference for *_, difference in cells) / most))
            for eps, cells in by_eps.items()
            if len(cells) == most
        ]
        found[function] = sorted(ranks, key=_second)
    return found


def fit_sentence(results: Results) -> str:
    """The eps that fits the paper's row best, for each attack and for both; "" if the paper has no row."""
    found = _fits(results)
    if not found:
        return ""
    parts = [f"{function.upper()} eps {ranks[0][0]:g}{_named(ranks)}" for function, ranks in found.items()]
    shared = set.intersection(*({eps for eps, _ in ranks} for ranks in found.values()))
    if len(found) > 1 and shared:
        squares = {eps: [dict(ranks)[eps] ** 2 for ranks in found.values()] for eps in shared}
        both = sorted(((eps, math.sqrt(sum(two) / len(two))) for eps, two in squares.items()), key=_second)
        parts.append(f"one eps for all attacks {both[0][0]:g}{_named(both)}")
    return (
        "By least squares over the row's cells (kNN and DkNN, each method), the paper's"
        f" {results.title} row fits best: {'; '.join(parts)}."
    )


def weight_sentence(found: Sequence[Results]) -> str:
    """The lambda with the lowest accuracy of each victim under each attack, beside the paper's .3."""
    attacked = [each for results in found for each in results.attacked() if each.method.kind == "dknnb_cl"]
    parts = []
    for (victim, function), cells in grouped(attacked, lambda each: (each.victim, each.function)).items():
        accuracies = {each.method.cls_weight or 0.0: each.accuracy.mean for each in cells}
        best, accuracy = min(accuracies.items(), key=_second)
        papers = f" ({accuracies[0.3]:.2f} % at .3)" if 0.3 in accuracies and best != 0.3 else ""
        name = f"{VICTIM_TITLES[victim]} under {function.upper()}"
        parts.append(f"{name} {accuracy:.2f} % at {best:g}{papers}")
    return f"Lowest accuracy, by lambda: {'; '.join(parts)}." if parts else ""


def _papers(results: Results, each: Measurement) -> float | None:
    return accuracy_at_any_settings(results.dataset, each.victim, each.method.kind, each.function)


def _second(pair: tuple[object, float]) -> float:
    return pair[1]


def _named(ranks: Sequence[tuple[float, float]]) -> str:
    edge = ranks[0][0] in (min(eps for eps, _ in ranks), max(eps for eps, _ in ranks)) and len(ranks) > 1
    following = f", next {ranks[1][0]:g} with {ranks[1][1]:.2f}" if len(ranks) > 1 else ""
    return (
        f" (root mean square difference {ranks[0][1]:.2f} points{following}"
        + ("; it is the first or last that was tried" if edge else "")
        + ")"
    )


def _area(points: _Curve, end: float) -> float:
    """Area under a piecewise linear curve from 0 to `end`."""
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        stop = min(x1, end)
        if x0 < stop:
            area += (stop - x0) * (y0 + y0 + (y1 - y0) * (stop - x0) / (x1 - x0)) / 2
    return area


def _half(points: _Curve) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 > 50 >= y1:
            return x0 + (x1 - x0) * (y0 - 50) / (y0 - y1)
    return None
