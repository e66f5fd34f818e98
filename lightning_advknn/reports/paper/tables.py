"""The paper's tables over seeds: our accuracies, the paper's, the difference, true L2."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import mean_of
from lightning_advknn.reports.records.grouping import columns_of, pivoted
from lightning_advknn.reports.records.names import KIND_TITLES, NETWORK_TITLES, VICTIM_TITLES
from lightning_advknn.reports.records.over_seeds import Measurement, Results, lines_by_cell, paper_of
from lightning_advknn.reports.render.blocks import Lines, Table
from lightning_advknn.reports.render.means import Mean

_OURS = "ours: mean ± standard deviation over seeds (number of seeds), accuracy in %"


def clean_table(found: Sequence[Results]) -> Table:
    """Clean accuracies (Table 1), one row a data set."""
    classifiers = {**VICTIM_TITLES, "dknnb": "DkNNB", "dknnb_cl": "DkNNB+CL"}
    rows: list[list[Lines]] = []
    for results in found:
        if results.runs:
            measured = accuracies(results)
            row = [_compared(*measured[name]) if name in measured else ("-",) for name in classifiers]
        else:
            theirs = published.CLEAN_ACCURACIES.get(results.dataset, {})
            row = [("not run", *_beside(theirs.get(name))) for name in classifiers]
        rows.append([(results.title,), *row])
    return Table(
        f"Table 1: accuracy on clean images ({_OURS}). The paper does not say whether its DkNNB was trained"
        " with CL; both stand beside its number.",
        ["data", *classifiers.values()],
        rows,
        sources=_sources(found),
    )


def attacked_table(results: Results) -> Table:
    """Accuracy of kNN and DkNN under attack (Table 2), one data set."""
    table = pivoted(
        results.measurements(),
        row=lambda each: (each.victim, each.method),
        column=lambda each: (each.attack, each.eps),
    )
    attacks = columns_of(table)
    rows: list[list[Lines]] = []
    # The paper has all methods of a victim together.
    for (victim, method), row in sorted(table.items(), key=lambda item: item[0][0] == "dknn"):
        heading = [(VICTIM_TITLES[victim],), (KIND_TITLES[method.kind],)]
        rows.append([*heading, *(_attacked(row[place][-1]) if place in row else ("-",) for place in attacks)])
    return Table(
        f"Table 2: {results.title}, accuracy under attack ({_OURS}), mean true L2 and mean credibility of"
        " all images. Lower accuracy is better for the attacker."
        + (" The paper does not state its eps here." if results.dataset == "FashionMNIST" else ""),
        ["victim", "method", *(_attack(results, *place) for place in attacks)],
        rows,
        headings=2,
        sources=_sources([results]),
    )


def transfer_table(results: Results, network: str) -> Table:
    """Transfer to another network (Table 3)."""
    table = pivoted(
        results.measurements(network),
        row=lambda each: (each.attack, each.eps, each.method),
        column=lambda each: each.victim,
    )
    order = list(dict.fromkeys(key[:2] for key in table))
    rows: list[list[Lines]] = []
    for (attack, eps, method), by_victim in sorted(table.items(), key=lambda item: order.index(item[0][:2])):
        row = {victim: found[-1] for victim, found in by_victim.items()}
        rows.append(
            [
                (_attack(results, attack, eps),),
                (KIND_TITLES[method.kind],),
                *(_compared(row[v].accuracy, row[v].paper) if v in row else ("-",) for v in VICTIM_TITLES),
                (f"{next(iter(row.values())).l2.mean:.2f}",),
            ]
        )
    return Table(
        f"Table 3: {results.title}, the same adversarials on {NETWORK_TITLES.get(network, network)} trained"
        f" on clean images ({_OURS}). Lower accuracy is better for the attacker.",
        ["attack", "method", *VICTIM_TITLES.values(), "mean true L2"],
        rows,
        headings=2,
        sources=_sources([results]),
    )


def series_table(
    caption: str, corner: str, points: Iterable[tuple[str, str, Measurement]], sources: Sequence[Results]
) -> Table:
    """The numbers of a figure.

    Args:
        caption: What they are. Accuracies in % and L2 are added to it.
        corner: Title of the first column, which names rows.
        points: Row, column and what was measured there, in order.
        sources: Results that they were made from.
    """
    table = pivoted(points, row=lambda point: point[0], column=lambda point: point[1])
    columns = columns_of(table)
    rows: list[list[Lines]] = [
        [(label,), *(_measured([each for *_, each in row[c]]) if c in row else ("-",) for c in columns)]
        for label, row in table.items()
    ]
    return Table(
        f"{caption}: accuracy in % (± standard deviation over seeds), mean true L2.",
        [corner, *columns],
        rows,
        sources=_sources(sources),
    )


def accuracies(results: Results) -> Mapping[str, tuple[Mean, float | None]]:
    """Clean accuracies over seeds and the paper's, of victims and of the first surrogate of each kind."""
    found: dict[str, tuple[Mean, float | None]] = {}
    for (name,), lines in lines_by_cell(results.table("table1"), "victim"):
        key = name if name in VICTIM_TITLES else results.methods[name].kind
        found.setdefault(key, (mean_of(lines, "accuracy"), paper_of(lines)))
    return found


def _compared(ours: Mean, theirs: float | None) -> Lines:
    """Our accuracy; below it the paper's and the difference."""
    return (str(ours), *_beside(theirs, ours))


def attack_text(attack: Mapping[str, Any]) -> str:
    """An attack's function and settings."""
    settings = ", ".join(f"{name} {value:g}" for name, value in attack["settings"].items())
    return f"{attack['function'].upper()} ({settings})"


def _attacked(each: Measurement) -> Lines:
    lines = _compared(each.accuracy, each.paper)
    credibility = "" if each.credibility is None else f", cred. {each.credibility.mean:.2f}"
    return lines if each.attack == "clean" else (*lines, f"L2 {each.l2.mean:.2f}{credibility}")


def _measured(found: Sequence[Measurement]) -> Lines:
    accuracies = (f"{VICTIM_TITLES[each.victim]} {each.accuracy.text()}" for each in found)
    return (*accuracies, f"L2 {found[0].l2.mean:.2f}")


def _attack(results: Results, attack: str, eps: float) -> str:
    return "clean" if attack == "clean" else f"{results.function(attack).upper()}, eps {eps:g}"


def _beside(theirs: float | None, ours: Mean | None = None) -> Lines:
    if theirs is None:
        return ()
    return (f"paper {theirs:.2f}" + ("" if ours is None else f", {ours.mean - theirs:+.2f}"),)


def _sources(found: Sequence[Results]) -> list[str]:
    return [results.name for results in found if results.runs]
