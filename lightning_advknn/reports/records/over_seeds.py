"""What `attack.py evaluate` left in result folders, read back and put together over seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_advknn.reports.records.csv_files import Record, check_seeds, read_csv
from lightning_advknn.reports.records.summary import neighbours_sentence
from lightning_advknn.storage import read_json

CLASSES = {
    "cifar10": "CIFAR10",
    "digits": "Digits",
    "fashion_mnist": "FashionMNIST",
    "gtsrb": "GTSRB",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "svhn": "SVHN",
}
TITLES = {**CLASSES, "cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
KINDS = {"origin": "Origin", "dknnb": "DkNNB", "dknnb_cl": "DkNNB+CL"}
NETWORKS = {"lenet5": "LeNet5"}
VICTIMS = {"dnn": "DNN", "knn": "kNN", "dknn": "DkNN"}


@dataclass(frozen=True)
class Planned:
    """One experiment that a grid asks for.

    Args:
        seed: Of training.
        command: What runs it alone.
        variation: Its folder within the part's, such as ``k=5``; "" if the part varies nothing.
        missing: What keeps it from running, such as data that is not there; "" if nothing does.
    """

    seed: int
    command: str
    variation: str = ""
    missing: str = ""


Plan = Mapping[str, Mapping[str, Sequence[Planned]]]
"""Experiments by data set, then by part: ``tables``, ``transfer``, ``layers``, ``neighbours``, ..."""


@dataclass(frozen=True)
class Mean:
    """One number over seeds, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Their sample standard deviation; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean ± standard deviation."""
        return f"{self.mean:.2f}" + ("" if self.sd is None else f" ± {self.sd:.2f}")

    def __str__(self) -> str:
        """Mean ± standard deviation (number of seeds)."""
        return f"{self.text} ({len(self.values)})"


@dataclass(frozen=True)
class Method:
    """What an attack differentiates, as its settings say.

    Args:
        name: Its name in the experiment.
        kind: One of `KINDS`: the backbone, a surrogate of L_CLS alone, one with consistency learning.
        layer: Whose features the surrogate reads; None for the backbone.
        cls_weight: Lambda of Eq. (16); None for the backbone.
    """

    name: str
    kind: str
    layer: str | None = None
    cls_weight: float | None = None

    @property
    def label(self) -> str:
        """As the paper calls it, and the layer."""
        return KINDS[self.kind] + (f", {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class Measurement:
    """One victim under one attack through one method: accuracy in %, mean true L2 and credibility of all images."""

    victim: str
    method: Method
    attack: str
    function: str
    """What the attack is: ``clean``, ``fgsm`` or ``bim``."""
    eps: float
    accuracy: Mean
    l2: Mean
    credibility: Mean | None
    paper: float | None
    n: int


@dataclass(frozen=True)
class Results:
    """One results folder: an experiment over seeds.

    Args:
        data: Folder name of the data set.
        part: What it is for.
        variation: Which of a varied setting's values it is of; "" if nothing varies.
        folder: Where it is.
        planned: What the grid asks for.
        runs: Summaries by seed. Without one a seed has not come to its end and does not count.
    """

    data: str
    part: str
    variation: str
    folder: Path
    planned: tuple[Planned, ...]
    runs: Mapping[int, Any]

    @property
    def name(self) -> str:
        """``<data>/<part>[/<variation>]``."""
        return "/".join(filter(None, (self.data, self.part, self.variation)))

    @property
    def title(self) -> str:
        """Name of the data set."""
        return TITLES.get(self.data, self.data)

    @property
    def dataset(self) -> str:
        """Name of the data set's class, by which the paper's numbers are kept."""
        return CLASSES.get(self.data, self.data)

    @property
    def to_run(self) -> list[Planned]:
        """What is missing of what was planned."""
        return [planned for planned in self.planned if planned.seed not in self.runs]

    @property
    def settings(self) -> Any:
        """The experiment's settings, which are the same for all seeds."""
        return next(iter(self.runs.values()))["settings"]

    @property
    def victim(self) -> Mapping[str, Any]:
        """The victims' settings: layer, k, metric, convention."""
        settings: Mapping[str, Any] = self.settings["victim"]
        return settings

    @property
    def notes(self) -> list[str]:
        """What the numbers have to say of themselves: whose files; by seed and network, how approximate neighbours were found."""
        note = self.settings["data"].get("note") if self.runs else None
        files = [f"{self.name}: {note}."] if note else []
        return files + [
            f"{self.name}, seed {seed}, {network}: {neighbours_sentence(found)}"
            for seed, run in self.runs.items()
            for network, found in run.get("approximation", {}).items()
        ]

    @property
    def layers(self) -> list[str]:
        """The backbone's layers in order."""
        return list(self.settings["trainings"]["origin"]["model"]["init_args"]["layers"])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The backbone and its surrogates by name, without networks that only judge."""
        found = {name: _method(name, training) for name, training in self.settings["trainings"].items()}
        return {name: method for name, method in found.items() if method.layer or name == "origin"}

    @property
    def networks(self) -> list[str]:
        """Networks that judge in Table 3."""
        return list(dict.fromkeys(str(line["network"]) for line in self.table("table3")))

    def table(self, name: str) -> list[Record]:
        """Lines of ``<name>.csv``, of finished seeds.

        Raises:
            ValueError: If they have changed since.
        """
        path = self.folder / f"{name}.csv"
        check_seeds(path, {seed: run.get("tables", {}).get(name) for seed, run in self.runs.items()})
        return [line for line in read_csv(path) if str(line["seed"]) in map(str, self.runs)]

    def function(self, attack: str) -> str:
        """Which function an attack is; ``clean`` is none."""
        return "clean" if attack == "clean" else str(self.settings["attacks"][attack]["function"])

    def measurements(self, network: str | None = None) -> list[Measurement]:
        """Cells of Table 2, or of Table 3 for a network that judges, over seeds in order of first appearance."""
        records = self.table("table3" if network else "table2")
        own = [record for record in records if network in (None, record.get("network"))]
        found = []
        for (victim, method, attack, eps), lines in cells(own, "victim", "method", "attack", "eps"):
            found.append(
                Measurement(
                    victim,
                    self.methods[method],
                    attack,
                    self.function(attack),
                    float(eps),
                    mean_of(lines, "accuracy"),
                    mean_of(lines, "l2_mean"),
                    mean_of(lines, "credibility_mean") if "credibility_mean" in lines[0] else None,
                    paper_of(lines),
                    int(lines[0]["n"] or 0),
                )
            )
        return found


def load(plan: Plan, results: Path) -> list[Results]:
    """Read the results of a grid, in its order, with those that are not there yet.

    Args:
        plan: The grid's experiments. ``tables`` lie in ``<results>/<data>``, other parts in
            ``<results>/<data>/<part>[/<variation>]``.
        results: Folder.

    Raises:
        ValueError: If a summary is damaged.
    """
    found = []
    for data, parts in plan.items():
        for part, planned in parts.items():
            for variation in dict.fromkeys(each.variation for each in planned):
                folder = results / data if part == "tables" else results / data / part / variation
                own = tuple(each for each in planned if each.variation == variation)
                found.append(Results(data, part, variation, folder, own, _summaries(folder)))
    return found


def cells(records: Iterable[Record], *names: str) -> list[tuple[tuple[str, ...], list[Record]]]:
    """Lines of the same cell over seeds, in order of first appearance."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(str(record[name]) for name in names), []).append(record)
    return list(found.items())


def mean_of(lines: Sequence[Record], column: str) -> Mean:
    """A column over seeds."""
    return Mean(tuple(float(str(line[column])) for line in lines))


def paper_of(lines: Sequence[Record]) -> float | None:
    """The paper's number beside a cell."""
    return None if lines[0]["paper"] is None else float(lines[0]["paper"])


def _summaries(folder: Path) -> dict[int, Any]:
    summaries = {}
    for path in folder.glob("seed*.json"):
        try:
            summaries[int(path.stem.removeprefix("seed"))] = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error} Delete it and run its experiment again.") from error
    return dict(sorted(summaries.items()))


def _method(name: str, training: Mapping[str, Any]) -> Method:
    arguments = training["model"]["init_args"]
    if "cl_weight" not in arguments:
        return Method(name, "origin")
    kind = "dknnb_cl" if arguments["cl_weight"] > 0 else "dknnb"
    return Method(name, kind, arguments["layer"], arguments["cls_weight"])
