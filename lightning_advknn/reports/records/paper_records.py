"""Records of Tables 1 to 3 from per-sample rows, and how one run's are printed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lightning_advknn.evaluation import Rows, summarize
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import Record
from lightning_advknn.reports.records.grouping import columns_of, pivoted
from lightning_advknn.reports.render.blocks import Lines, Table

COLUMNS = {
    "table1": ("victim", "accuracy", "paper", "n", "seed"),
    "table2": (
        "victim",
        "method",
        "attack",
        "eps",
        "accuracy",
        "paper",
        "l2_mean",
        "l2_mean_success",
        "credibility_mean",
        "n",
        "seed",
    ),
    "table3": ("network", "victim", "method", "attack", "eps", "accuracy", "paper", "l2_mean", "n", "seed"),
}
"""Columns of ``<table>.csv``."""

_LAYOUTS = {
    "table1": (("seed",), "victim"),
    "table2": (("victim", "method"), "attack"),
    "table3": (("network", "attack", "method"), "victim"),
}
"""Columns that name a row of a printed table, and the one that its columns are of."""


def clean_records(data: str, experiment: Experiment, clean: Mapping[str, Rows]) -> list[Record]:
    """Clean accuracies in % (Table 1).

    Args:
        data: Name of the data set.
        experiment: Its seed and the victims' settings.
        clean: Rows without an attack, by method.
    """
    first = summarize(next(iter(clean.values())))
    accuracies = {victim: first[f"{victim}_acc"] for victim in ("dnn", "knn", "dknn")}
    accuracies |= {
        method: summarize(rows)["surrogate_acc"]
        for method, rows in clean.items()
        if "surrogate_after" in rows
    }
    return [
        {
            "victim": victim,
            "accuracy": round(100 * accuracy, 4),
            "paper": published.clean_accuracy(data, victim, asdict(experiment.victim)),
            "n": int(first["n"]),
            "seed": experiment.seed,
        }
        for victim, accuracy in accuracies.items()
    ]


def attacked_records(
    data: str, experiment: Experiment, method: str, attack: str | None, rows: Rows
) -> list[Record]:
    """One attack through one method: accuracies of kNN and DkNN in % (Table 2), true L2, credibility.

    Args:
        data: Name of the data set.
        experiment: Its seed, the victims' and attacks' settings.
        method: What was differentiated.
        attack: Name of the attack; None leaves the images as they are.
        rows: Its rows.
    """
    metrics = summarize(rows)
    records = []
    for victim in ("knn", "dknn"):
        record = _record(experiment, victim, method, attack, metrics)
        success = metrics[f"{victim}_l2_success"]
        more: Record = {
            "paper": published.accuracy_under_attack(data, *_papers_cell(experiment, victim, method, attack)),
            "l2_mean_success": None if math.isnan(success) else round(success, 4),
            "credibility_mean": round(metrics[f"{victim}_credibility"], 4),
        }
        records.append(record | more)
    return records


def transfer_records(
    data: str, experiment: Experiment, network: str, method: str, attack: str | None, rows: Rows
) -> list[Record]:
    """One attack through one method on a transfer network (Table 3): accuracies in %, true L2.

    Args:
        data: Name of the data set.
        experiment: Its seed, the victims' and attacks' settings.
        network: The transfer network.
        method: What was differentiated.
        attack: Name of the attack; None leaves the images as they are.
        rows: The rows on this network.
    """
    metrics = summarize(rows)
    records = []
    for victim in ("dnn", "knn", "dknn"):
        cell = _papers_cell(experiment, victim, method, attack)
        paper = published.accuracy_on_transfer(data, network, *cell)
        records.append(
            _record(experiment, victim, method, attack, metrics) | {"network": network, "paper": paper}
        )
    return records


def shown(name: str, records: Sequence[Record], caption: str) -> Table:
    """The records of one run as they are printed: our accuracies in %, the paper's in brackets.

    Args:
        name: ``table1``, ``table2`` or ``table3``.
        records: Its lines.
        caption: What the table shows.
    """
    names, across = _LAYOUTS[name]
    rows = pivoted(
        records,
        row=lambda record: tuple(str(record[column]) for column in names),
        column=lambda record: str(record[across]),
    )
    columns = columns_of(rows)
    cells = [
        [
            *((part,) for part in key),
            *(_shown(row[column][0]) if column in row else ("-",) for column in columns),
        ]
        for key, row in rows.items()
    ]
    return Table(caption, [*names, *columns], cells, headings=len(names))


def _record(
    experiment: Experiment, victim: str, method: str, attack: str | None, metrics: Mapping[str, float]
) -> Record:
    """What Tables 2 and 3 share."""
    settings = experiment.attacks[attack].settings if attack else {}
    return {
        "victim": victim,
        "method": method,
        "attack": attack or "clean",
        "eps": settings.get("eps", 0),
        "accuracy": round(100 * metrics[f"{victim}_acc"], 4),
        "l2_mean": round(metrics["l2"], 4),
        "n": int(metrics["n"]),
        "seed": experiment.seed,
    }


def _papers_cell(
    experiment: Experiment, victim: str, method: str, attack: str | None
) -> tuple[str, str, str, Mapping[str, float], Mapping[str, object]]:
    """Which cell of the paper's tables a record belongs to, as in `published`."""
    settings = experiment.attacks[attack].settings if attack else {}
    return victim, method, attack or "clean", settings, asdict(experiment.victim)


def _shown(record: Record) -> Lines:
    theirs = f" ({record['paper']:.2f})" if record["paper"] is not None else ""
    accuracy = f"{record['accuracy']:.2f}{theirs}"
    if record.get("attack", "clean") == "clean" or "credibility_mean" not in record:
        return (accuracy,)
    return accuracy, f"L2 {record['l2_mean']:.2f} cred. {record['credibility_mean']:.2f}"
