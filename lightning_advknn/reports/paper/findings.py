"""Whether the paper's claims hold in the results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_advknn.reports.paper.curve_areas import ranking
from lightning_advknn.reports.paper.tables import accuracies
from lightning_advknn.reports.records.grouping import grouped, pivoted
from lightning_advknn.reports.records.names import KIND_TITLES, NETWORK_TITLES, VICTIM_TITLES
from lightning_advknn.reports.records.over_seeds import Measurement, Results
from lightning_advknn.reports.records.published import accuracy_at_any_settings

_TOLERANCE = 0.5  # points that Table 1 may differ by


@dataclass(frozen=True)
class Finding:
    """A claim, whether it holds here, and the numbers that decide it."""

    claim: str
    holds: bool
    detail: str


def clean_accuracies_agree(results: Results) -> Finding | None:
    """Table 1 is within `_TOLERANCE` of the paper's. None where the paper has none."""
    differences = {
        {**VICTIM_TITLES, **KIND_TITLES}[name]: ours.mean - theirs
        for name, (ours, theirs) in accuracies(results).items()
        if theirs is not None
    }
    if not differences:
        return None
    return Finding(
        f"Table 1, {results.title}: clean accuracies within {_TOLERANCE} points of the paper's",
        all(abs(difference) <= _TOLERANCE for difference in differences.values()),
        "; ".join(f"{name} {difference:+.2f}" for name, difference in differences.items()),
    )


def ordering(results: Results) -> list[Finding]:
    """Origin > DkNNB > DkNNB+CL in seed-mean accuracy, for each victim and attack of Table 2."""
    table = pivoted(
        results.attacked(),
        row=lambda each: (each.victim, each.attack, each.eps),
        column=lambda each: each.method.kind,
    )
    rows = [row for row in table.values() if set(row) == set(KIND_TITLES)]
    return [_order(results, [row[kind][0] for kind in KIND_TITLES]) for row in rows]


def transfer(results: Results, network: str) -> list[Finding]:
    """DkNNB+CL transfers to a network better than Origin, for each attack of Table 3."""
    found = []
    attacks = grouped(results.attacked(network), lambda each: (each.function, each.eps))
    for (function, eps), cells in attacks.items():
        by_victim = pivoted(cells, row=lambda each: each.victim, column=lambda each: each.method.kind)
        pairs = {
            victim: (kinds["origin"][0].accuracy.mean, kinds["dknnb_cl"][0].accuracy.mean)
            for victim, kinds in by_victim.items()
            if {"origin", "dknnb_cl"} <= set(kinds)
        }
        if pairs:
            found.append(
                Finding(
                    f"Table 3, {results.title}, {function.upper()} at eps {eps:g}: DkNNB+CL transfers better"
                    f" to {NETWORK_TITLES.get(network, network)} than Origin (in the paper all but BIM on"
                    " the DNN)",
                    all(origin > ours for origin, ours in pairs.values()),
                    "; ".join(
                        f"{VICTIM_TITLES[victim]} {origin:.2f} to {ours:.2f} %"
                        for victim, (origin, ours) in pairs.items()
                    ),
                )
            )
    return found


def best_layer(results: Results) -> Finding | None:
    """The strongest surrogate against the kNN is on the kNN's own layer. None without several layers."""
    ranks = [rank for rank in ranking(results, "knn")[0] if rank.method.layer]
    if len({rank.method.layer for rank in ranks}) < 2:
        return None
    order = list(dict.fromkeys(rank.method.layer or "" for rank in ranks))
    return Finding(
        f"Figure 4, {results.title}: surrogates on the kNN's own layer ({results.victim['layer']}) bring kNN"
        " lowest",
        order[0] == results.victim["layer"],
        "layers by their best surrogate, strongest first: " + ", ".join(order),
    )


def growing_k(found: Sequence[Results]) -> list[Finding]:
    """DkNNB+CL succeeds more often than Origin at each k, for each attack and victim (Figure 7)."""
    measured = [(results.victim["k"], each) for results in found for each in results.attacked()]
    findings = []
    for (function, victim), cells in grouped(measured, lambda one: (one[1].function, one[1].victim)).items():
        at_k = pivoted(cells, row=lambda one: one[0], column=lambda one: one[1].method.kind)
        success = {
            k: {kind: 100 - own[-1][1].accuracy.mean for kind, own in kinds.items()}
            for k, kinds in sorted(at_k.items())
        }
        gains = {
            k: kinds["dknnb_cl"] - kinds["origin"]
            for k, kinds in success.items()
            if {"origin", "dknnb_cl"} <= set(kinds)
        }
        if gains:
            findings.append(
                Finding(
                    f"Figure 7, {found[0].title}: {function.upper()} through DkNNB+CL succeeds against"
                    f" {VICTIM_TITLES[victim]} more often than through Origin at every k",
                    all(gain > 0 for gain in gains.values()),
                    "points more: " + ", ".join(f"{gain:+.2f} at k = {k}" for k, gain in gains.items()),
                )
            )
    return findings


def _order(results: Results, row: Sequence[Measurement]) -> Finding:
    first = row[0]
    holds = all(left.accuracy.mean > right.accuracy.mean for left, right in pairwise(row))
    detail = " > ".join(f"{each.accuracy.mean:.2f}" for each in row) if holds else _why_not(results, row)
    return Finding(
        f"Table 2, {results.title}: Origin > DkNNB > DkNNB+CL in {VICTIM_TITLES[first.victim]} accuracy under"
        f" {first.function.upper()} at eps {first.eps:g}",
        holds,
        detail,
    )


def _why_not(results: Results, row: Sequence[Measurement]) -> str:
    parts = [", ".join(f"{KIND_TITLES[each.method.kind]} {each.accuracy.mean:.2f}" for each in row) + " %"]
    parts += [
        _excess(left, right) for left, right in pairwise(row) if right.accuracy.mean >= left.accuracy.mean
    ]
    theirs = [
        accuracy_at_any_settings(results.dataset, each.victim, each.method.kind, each.function)
        for each in row
    ]
    known = [each for each in theirs if each is not None]
    if len(known) == len(row) and not all(left > right for left, right in pairwise(known)):
        parts.append(f"the paper's own cells are not in this order ({', '.join(map(str, known))})")
    return "; ".join(parts)


def _excess(left: Measurement, right: Measurement) -> str:
    """How far the right one, which should be lower, is above the left one."""
    left_title, right_title = (KIND_TITLES[each.method.kind] for each in (left, right))
    gap = right.accuracy.mean - left.accuracy.mean
    if not gap:
        return f"{right_title} and {left_title} are equal"
    share = (left.accuracy.mean + right.accuracy.mean) / 200
    error = 100 * math.sqrt(2 * share * (1 - share) / left.n)
    size = "less" if gap <= 2 * error else "more"
    return (
        f"{right_title} is {gap:.2f} points above {left_title}, {size} than twice the standard error"
        f" ({error:.2f}) of such a difference on {left.n} images"
    )
