"""Tables 1 to 3 from per-sample rows; as CSV files, on the terminal and in Markdown."""

import math
from collections.abc import Mapping
from dataclasses import asdict

from lightning_advknn.evaluation import Rows, summarize
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import Record

TABLE1 = ("victim", "accuracy", "paper", "n", "seed")
TABLE2 = (
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
)
TABLE3 = ("network", "victim", "method", "attack", "eps", "accuracy", "paper", "l2_mean", "n", "seed")


def table1_records(data: str, experiment: Experiment, clean: Mapping[str, Rows]) -> list[Record]:
    """Clean accuracies in % (Table 1).

    Args:
        data: Name of the data set.
        experiment: Its seed and victim's settings.
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
            "paper": published.table1(data, victim, asdict(experiment.victim)),
            "n": int(first["n"]),
            "seed": experiment.seed,
        }
        for victim, accuracy in accuracies.items()
    ]


def table2_records(
    data: str, experiment: Experiment, method: str, attack: str | None, rows: Rows
) -> list[Record]:
    """One attack through one method: kNN's and DkNN's accuracy in % (Table 2), true L2, credibility.

    Args:
        data: Name of the data set.
        experiment: Its seed, victim's and attacks' settings.
        method: What was differentiated.
        attack: Name of the attack; None leaves the images as they are.
        rows: Its rows.
    """
    settings = experiment.attacks[attack].settings if attack else {}
    name = attack or "clean"
    metrics = summarize(rows)
    return [
        {
            "victim": victim,
            "method": method,
            "attack": name,
            "eps": settings.get("eps", 0),
            "accuracy": round(100 * metrics[f"{victim}_acc"], 4),
            "paper": published.table2(data, victim, method, name, settings, asdict(experiment.victim)),
            "l2_mean": round(metrics["l2"], 4),
            "l2_mean_success": _number(metrics[f"{victim}_l2_success"]),
            "credibility_mean": round(metrics[f"{victim}_credibility"], 4),
            "n": int(metrics["n"]),
            "seed": experiment.seed,
        }
        for victim in ("knn", "dknn")
    ]


def table3_records(
    data: str, experiment: Experiment, network: str, method: str, attack: str | None, rows: Rows
) -> list[Record]:
    """What another network makes of one attack through one method (Table 3): accuracies in % of its victims, true L2.

    Args:
        data: Name of the data set.
        experiment: Its seed, victim's and attacks' settings.
        network: Name of the network that judges.
        method: What was differentiated.
        attack: Name of the attack; None leaves the images as they are.
        rows: That network's.
    """
    settings = experiment.attacks[attack].settings if attack else {}
    name = attack or "clean"
    metrics = summarize(rows)
    return [
        {
            "network": network,
            "victim": victim,
            "method": method,
            "attack": name,
            "eps": settings.get("eps", 0),
            "accuracy": round(100 * metrics[f"{victim}_acc"], 4),
            "paper": published.table3(
                data, network, victim, method, name, settings, asdict(experiment.victim)
            ),
            "l2_mean": round(metrics["l2"], 4),
            "n": int(metrics["n"]),
            "seed": experiment.seed,
        }
        for victim in ("dnn", "knn", "dknn")
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
