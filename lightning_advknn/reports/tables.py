"""Tables 1 to 3 from per-sample rows; as CSV files, on the terminal and in Markdown."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_advknn.evaluation import Rows, summarize
from lightning_advknn.experiment import Experiment
from lightning_advknn.reports import paper
from lightning_advknn.storage import atomic_path, digest

Record = dict[str, str | int | float | None]

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
NOTE = "note"  # column of tables that have something to say of all their numbers, such as the recall of approximate neighbours
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
            "paper": paper.table1(data, victim, asdict(experiment.victim)),
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
            "paper": paper.table2(data, victim, method, name, settings, asdict(experiment.victim)),
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
            "paper": paper.table3(data, network, victim, method, name, settings, asdict(experiment.victim)),
            "l2_mean": round(metrics["l2"], 4),
            "n": int(metrics["n"]),
            "seed": experiment.seed,
        }
        for victim in ("dnn", "knn", "dknn")
    ]


def with_note(records: Sequence[Record], note: str) -> list[Record]:
    """Records with a note, if there is one."""
    return [{**record, NOTE: note} for record in records] if note else list(records)


def with_note_column(columns: Sequence[str], records: Sequence[Record]) -> Sequence[str]:
    """Columns of records that may have a note."""
    return (*columns, NOTE) if any(NOTE in record for record in records) else columns


def write_csv(path: Path, columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> None:
    """Write a table, whole or not at all; None becomes an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read_csv(path: Path) -> list[Record]:
    """Read a table that `write_csv` wrote; cells are text, empty ones None.

    Raises:
        ValueError: If it is no such table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"Expected {path} to be a table, but it is damaged: {error}.") from error
    if any(None in line or None in line.values() for line in lines):
        raise ValueError(f"Expected {path} to be a table, but it is damaged: lines differ in length.")
    return [{name: cell or None for name, cell in line.items()} for line in lines]


def seed_digest(path: Path, seed: int) -> str:
    """Hash of a seed's lines in a table over seeds, by which its summary knows them."""
    return digest([line for line in read_csv(path) if line.get("seed") == str(seed)])


def check_seeds(path: Path, digests: Mapping[int, str | None]) -> None:
    """Raise a ValueError unless seeds' lines in a table are those that their runs left there.

    Args:
        path: Of the table.
        digests: `seed_digest` by seed, as it was then; None of an earlier version's run, which kept none.
    """
    for seed, known in digests.items():
        if known is not None and seed_digest(path, seed) != known:
            raise ValueError(
                f"Expected {path} to hold what the run of seed {seed} found, but it has changed since. Delete its summary"
                " beside the table and run it again."
            )


def merge_csv(path: Path, columns: Sequence[str], records: Iterable[Record], seed: int) -> None:
    """Put a seed's lines into a table over seeds, in place of those it has there."""
    others = [record for record in read_csv(path) if record.get("seed") != str(seed)]
    write_csv(path, columns, sorted([*others, *records], key=lambda record: int(str(record["seed"]))))


def print_table2(records: Sequence[Record], title: str) -> None:
    """Show accuracies as the paper's Table 2 does: ours, the paper's in brackets, then true L2 and credibility."""
    attacks = list(dict.fromkeys(str(record["attack"]) for record in records))
    table = Table(
        title=title,
        caption="accuracy % (paper's); mean true L2 and mean credibility over all images",
        box=None,
    )
    table.add_column("victim")
    table.add_column("method")
    for attack in attacks:
        table.add_column(attack, justify="right")
    cells = {(r["victim"], r["method"], r["attack"]): r for r in records}
    for victim, method in dict.fromkeys((r["victim"], r["method"]) for r in records):
        found = [cells.get((victim, method, attack)) for attack in attacks]
        table.add_row(str(victim), str(method), *(_cell(record) for record in found))
    Console().print(table)


def print_table1(records: Sequence[Record], title: str) -> None:
    """Show clean accuracies, the paper's in brackets."""
    table = Table(title=title, box=None)
    table.add_column("classifier")
    table.add_column("accuracy % (paper's)", justify="right")
    for record in records:
        table.add_row(str(record["victim"]), _accuracy(record))
    Console().print(table)


def print_table3(records: Sequence[Record], title: str) -> None:
    """Show accuracies on other networks as the paper's Table 3 does: ours, the paper's in brackets."""
    table = Table(title=title, caption="accuracy % (paper's)", box=None)
    for name in ("network", "attack", "method"):
        table.add_column(name)
    victims = list(dict.fromkeys(str(record["victim"]) for record in records))
    for victim in victims:
        table.add_column(victim, justify="right")
    cells = {(r["network"], r["attack"], r["method"], r["victim"]): r for r in records}
    for row in dict.fromkeys((r["network"], r["attack"], r["method"]) for r in records):
        table.add_row(*map(str, row), *(_accuracy(cells[(*row, victim)]) for victim in victims))
    Console().print(table)


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record["attack"] == "clean":
        return _accuracy(record)
    return f"{_accuracy(record)}\nL2 {record['l2_mean']:.2f} cred. {record['credibility_mean']:.2f}"


def _accuracy(record: Record) -> str:
    theirs = f" ({record['paper']:.2f})" if record["paper"] is not None else ""
    return f"{record['accuracy']:.2f}{theirs}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
