"""Tables laid out as in the paper: ours over seeds, the paper's, the difference, true L2."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.over_seeds import (
    KINDS,
    NETWORKS,
    VICTIMS,
    Mean,
    Measurement,
    Results,
    cells,
    mean_of,
    paper_of,
)
from lightning_advknn.reports.render.page import Lines, Table

OURS = "ours: mean ± standard deviation over seeds (number of seeds), accuracy in %"


def table1(found: Sequence[Results]) -> Table:
    """Clean accuracies (Table 1), one row a data set."""
    classifiers = {**VICTIMS, "dknnb": "DkNNB", "dknnb_cl": "DkNNB+CL"}
    rows: list[list[Lines]] = []
    for results in found:
        if results.runs:
            measured = accuracies(results)
            row = [compared(*measured[name]) if name in measured else ("-",) for name in classifiers]
        else:
            theirs = published.TABLE1.get(results.dataset, {})
            row = [("not run", *_beside(theirs.get(name))) for name in classifiers]
        rows.append([(results.title,), *row])
    return Table(
        f"Table 1: accuracy on clean images ({OURS}). The paper does not say whether its DkNNB was trained with CL; both"
        " stand beside its number.",
        ["data", *classifiers.values()],
        rows,
        sources=_sources(found),
    )


def table2(results: Results) -> Table:
    """Accuracy of kNN and DkNN under attack (Table 2), one data set."""
    found = results.measurements()
    attacks = list(dict.fromkeys((each.attack, each.eps) for each in found))
    by_row: dict[tuple[str, str], dict[tuple[str, float], Measurement]] = {}
    for each in found:
        by_row.setdefault((each.victim, each.method.name), {})[each.attack, each.eps] = each
    rows: list[list[Lines]] = []
    # The paper has all methods of a victim together.
    for victim, method in sorted(by_row, key=lambda row: row[0] == "dknn"):
        row = by_row[victim, method]
        label = KINDS[results.methods[method].kind]
        rows.append(
            [(VICTIMS[victim],), (label,), *(_attacked(row[a]) if a in row else ("-",) for a in attacks)]
        )
    return Table(
        f"Table 2: {results.title}, accuracy under attack ({OURS}), mean true L2 and mean credibility of all images."
        " Lower accuracy is better for the attacker."
        + (" The paper does not state its eps here." if results.dataset == "FashionMNIST" else ""),
        ["victim", "method", *(_attack(results, *attack) for attack in attacks)],
        rows,
        headings=2,
        sources=_sources([results]),
    )


def table3(results: Results, network: str) -> Table:
    """Transfer to another network (Table 3)."""
    found = results.measurements(network)
    by_row: dict[tuple[str, float, str], dict[str, Measurement]] = {}
    for each in found:
        by_row.setdefault((each.attack, each.eps, each.method.name), {})[each.victim] = each
    order = list(dict.fromkeys(key[:2] for key in by_row))
    rows: list[list[Lines]] = []
    for attack, eps, method in sorted(by_row, key=lambda key: order.index(key[:2])):
        row = by_row[attack, eps, method]
        rows.append(
            [
                (_attack(results, attack, eps),),
                (KINDS[results.methods[method].kind],),
                *(compared(row[v].accuracy, row[v].paper) if v in row else ("-",) for v in VICTIMS),
                (f"{next(iter(row.values())).l2.mean:.2f}",),
            ]
        )
    return Table(
        f"Table 3: {results.title}, the same adversarials on {NETWORKS.get(network, network)} trained on clean images ({OURS}). Lower accuracy"
        " is better for the attacker.",
        ["attack", "method", *VICTIMS.values(), "mean true L2"],
        rows,
        headings=2,
        sources=_sources([results]),
    )


def series_table(
    caption: str, corner: str, points: Iterable[tuple[str, str, Measurement]], sources: Sequence[Results]
) -> Table:
    """The numbers of a figure.

    Args:
        caption: What they are; accuracies in % are added to it.
        corner: What names rows and columns.
        points: Row, column and what was measured there, in order.
        sources: What they were made from.
    """
    rows: dict[str, dict[str, list[Measurement]]] = {}
    for row, column, each in points:
        rows.setdefault(row, {}).setdefault(column, []).append(each)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body: list[list[Lines]] = [
        [(label,), *(_measured(row[column]) if column in row else ("-",) for column in columns)]
        for label, row in rows.items()
    ]
    return Table(
        f"{caption}: accuracy in % (± standard deviation over seeds), mean true L2.",
        [corner, *columns],
        body,
        sources=_sources(sources),
    )


def accuracies(results: Results) -> Mapping[str, tuple[Mean, float | None]]:
    """Clean accuracies over seeds and the paper's, of victims and of the first surrogate of each kind."""
    found: dict[str, tuple[Mean, float | None]] = {}
    for (name,), lines in cells(results.table("table1"), "victim"):
        key = name if name in VICTIMS else results.methods[name].kind
        found.setdefault(key, (mean_of(lines, "accuracy"), paper_of(lines)))
    return found


def compared(ours: Mean, theirs: float | None) -> Lines:
    """Ours; below it the paper's and the difference."""
    return (str(ours), *_beside(theirs, ours))


def attack_text(attack: Mapping[str, Any]) -> str:
    """An attack's function and settings."""
    settings = ", ".join(f"{name} {value:g}" for name, value in attack["settings"].items())
    return f"{attack['function'].upper()} ({settings})"


def _attacked(each: Measurement) -> Lines:
    lines = compared(each.accuracy, each.paper)
    credibility = "" if each.credibility is None else f", cred. {each.credibility.mean:.2f}"
    return lines if each.attack == "clean" else (*lines, f"L2 {each.l2.mean:.2f}{credibility}")


def _measured(found: Sequence[Measurement]) -> Lines:
    return (
        *(f"{VICTIMS[each.victim]} {each.accuracy.text}" for each in found),
        f"L2 {found[0].l2.mean:.2f}",
    )


def _attack(results: Results, attack: str, eps: float) -> str:
    return "clean" if attack == "clean" else f"{results.function(attack).upper()}, eps {eps:g}"


def _beside(theirs: float | None, ours: Mean | None = None) -> Lines:
    if theirs is None:
        return ()
    return (f"paper {theirs:.2f}" + ("" if ours is None else f", {ours.mean - theirs:+.2f}"),)


def _sources(found: Sequence[Results]) -> list[str]:
    return [results.name for results in found if results.runs]
