"""What the results say about the paper's claims: computed, never claimed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_advknn.reports.paper.curve_areas import ranking
from lightning_advknn.reports.paper.tables import accuracies
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.over_seeds import KINDS, NETWORKS, VICTIMS, Measurement, Results

TOLERANCE = 0.5  # points that Table 1 may differ by


@dataclass(frozen=True)
class Finding:
    """A claim, whether it holds here, and the numbers that say so."""

    claim: str
    holds: bool
    detail: str


def clean_accuracy(results: Results) -> Finding | None:
    """Whether Table 1 is within `TOLERANCE` of the paper's; None where the paper has none."""
    differences = {
        {**VICTIMS, **KINDS}[name]: ours.mean - theirs
        for name, (ours, theirs) in accuracies(results).items()
        if theirs is not None
    }
    if not differences:
        return None
    return Finding(
        f"Table 1, {results.title}: clean accuracies within {TOLERANCE} points of the paper's",
        all(abs(difference) <= TOLERANCE for difference in differences.values()),
        "; ".join(f"{name} {difference:+.2f}" for name, difference in differences.items()),
    )


def ordering(results: Results) -> list[Finding]:
    """Whether Origin > DkNNB > DkNNB+CL in seed-mean accuracy, for each victim and attack of Table 2."""
    rows: dict[tuple[str, str, float], dict[str, Measurement]] = {}
    for each in results.measurements():
        if each.function != "clean":
            rows.setdefault((each.victim, each.attack, each.eps), {}).setdefault(each.method.kind, each)
    return [_order(results, [row[kind] for kind in KINDS]) for row in rows.values() if set(row) == set(KINDS)]


def transfer(results: Results, network: str) -> list[Finding]:
    """Whether DkNNB+CL transfers to a network better than Origin, for each attack of Table 3."""
    rows: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
    for each in results.measurements(network):
        if each.function != "clean":
            row = rows.setdefault((each.function, each.eps), {})
            row.setdefault(each.victim, {}).setdefault(each.method.kind, each.accuracy.mean)
    found = []
    for (function, eps), row in rows.items():
        pairs = {v: (a["origin"], a["dknnb_cl"]) for v, a in row.items() if {"origin", "dknnb_cl"} <= set(a)}
        if pairs:
            found.append(
                Finding(
                    f"Table 3, {results.title}, {function.upper()} at eps {eps:g}: DkNNB+CL transfers better to"
                    f" {NETWORKS.get(network, network)} than Origin"
                    " (in the paper all but BIM on the DNN)",
                    all(origin > ours for origin, ours in pairs.values()),
                    "; ".join(
                        f"{VICTIMS[victim]} {origin:.2f} to {ours:.2f} %"
                        for victim, (origin, ours) in pairs.items()
                    ),
                )
            )
    return found


def best_layer(results: Results) -> Finding | None:
    """Whether the victim's own layer has the strongest surrogate against the kNN; None without several layers."""
    ranks = [rank for rank in ranking(results, "knn")[0] if rank.method.layer]
    if len({rank.method.layer for rank in ranks}) < 2:
        return None
    order = list(dict.fromkeys(rank.method.layer or "" for rank in ranks))
    return Finding(
        f"Figure 4, {results.title}: surrogates on the kNN's own layer ({results.victim['layer']}) bring kNN lowest",
        order[0] == results.victim["layer"],
        "layers by their best surrogate, strongest first: " + ", ".join(order),
    )


def growing_k(found: Sequence[Results]) -> list[Finding]:
    """Whether DkNNB+CL succeeds at least as often as Origin at each k, for each attack and victim (Figure 7)."""
    rows: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for results in found:
        for each in results.measurements():
            if each.function != "clean":
                at_k = rows.setdefault((each.function, each.victim), {}).setdefault(results.victim["k"], {})
                at_k[each.method.kind] = 100 - each.accuracy.mean
    findings = []
    for (function, victim), ks in rows.items():
        gains = {
            k: kinds["dknnb_cl"] - kinds["origin"]
            for k, kinds in sorted(ks.items())
            if {"origin", "dknnb_cl"} <= set(kinds)
        }
        if gains:
            findings.append(
                Finding(
                    f"Figure 7, {found[0].title}: {function.upper()} through DkNNB+CL succeeds against"
                    f" {VICTIMS[victim]} more often than through Origin at every k",
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
        f"Table 2, {results.title}: Origin > DkNNB > DkNNB+CL in {VICTIMS[first.victim]} accuracy under"
        f" {first.function.upper()} at eps {first.eps:g}",
        holds,
        detail,
    )


def _why_not(results: Results, row: Sequence[Measurement]) -> str:
    parts = [", ".join(f"{KINDS[each.method.kind]} {each.accuracy.mean:.2f}" for each in row) + " %"]
    for left, right in pairwise(row):
        gap = right.accuracy.mean - left.accuracy.mean
        if gap >= 0:
            share = (left.accuracy.mean + right.accuracy.mean) / 200
            error = 100 * math.sqrt(2 * share * (1 - share) / left.n)
            size = "less" if gap <= 2 * error else "more"
            parts.append(
                f"{KINDS[right.method.kind]} is {gap:.2f} points above {KINDS[left.method.kind]}, {size} than twice the"
                f" standard error ({error:.2f}) of such a difference on {left.n} images"
                if gap
                else f"{KINDS[right.method.kind]} and {KINDS[left.method.kind]} are equal"
            )
    theirs = [
        published.table2_cell(results.dataset, each.victim, each.method.kind, each.function) for each in row
    ]
    known = [each for each in theirs if each is not None]
    if len(known) == len(row) and not all(left > right for left, right in pairwise(known)):
        parts.append(f"the paper's own cells are not in this order ({', '.join(map(str, known))})")
    return "; ".join(parts)
