"""Results that `attack.py evaluate` left in folders, read back over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_advknn.reports.records.csv_files import Record, check_seeds, mean_of, number, read_csv
from lightning_advknn.reports.records.grouping import grouped
from lightning_advknn.reports.records.names import DATA_CLASSES, DATA_TITLES, KIND_TITLES
from lightning_advknn.reports.records.summaries import neighbours_sentence
from lightning_advknn.reports.render.means import Mean
from lightning_advknn.storage import read_json


@dataclass(frozen=True)
class Planned:
    """One experiment that a grid asks for.

    Args:
        seed: Of training.
        command: The command that runs it alone.
        variation: Its folder within the part's, such as ``k=5``; "" if the part varies nothing.
        missing: Why it cannot run, such as missing data; "" if it can.
    """

    seed: int
    command: str
    variation: str = ""
    missing: str = ""


Plan = Mapping[str, Mapping[str, Sequence[Planned]]]
"""Experiments by data set, then by part: ``tables``, ``transfer``, ``layers``, ``neighbours``, ..."""


@dataclass(frozen=True)
class Method:
    """What an attack differentiates, as the settings of its training say.

    Args:
        name: Its name in the experiment.
        kind: One of `KIND_TITLES`: the backbone, a surrogate of L_CLS alone, one with consistency learning.
        layer: The layer whose features the surrogate reads; None for the backbone.
        cls_weight: Lambda of Eq. (16); None for the backbone.
    """

    name: str
    kind: str
    layer: str | None = None
    cls_weight: float | None = None

    @property
    def label(self) -> str:
        """The paper's name, and the layer."""
        return KIND_TITLES[self.kind] + (f", {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class Measurement:
    """One victim under one attack through one method, over seeds.

    Args:
        victim: ``dnn``, ``knn`` or ``dknn``.
        method: What was differentiated.
        attack: Name of the attack; ``clean`` is none.
        function: The attack's function: ``clean``, ``fgsm``, ``bim``, ...
        eps: Its radius; 0 of clean images.
        accuracy: In %.
        l2: Mean true L2 of all images.
        credibility: Mean over all images; None where the table has none.
        paper: The paper's accuracy in %, None where it has none.
        n: Number of images.
    """

    victim: str
    method: Method
    attack: str
    function: str
    eps: float
    accuracy: Mean
    l2: Mean
    credibility: Mean | None
    paper: float | None
    n: int

    @property
    def clean(self) -> bool:
        """Whether the images are as they were."""
        return self.function == "clean"


@dataclass(frozen=True)
class Results:
    """One results folder: an experiment over seeds.

    Args:
        data: Folder name of the data set.
        part: Which part of a grid the experiment belongs to.
        variation: The value of what the part varies; "" if it varies nothing.
        folder: The folder.
        planned: What the grid asks for.
        runs: Summaries by seed. A seed without a summary has not finished and does not count.
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
        """Name of the data set in tables."""
        return DATA_TITLES.get(self.data, self.data)

    @property
    def dataset(self) -> str:
        """Class of the data set, the key of the paper's numbers."""
        return DATA_CLASSES.get(self.data, self.data)

    @property
    def to_run(self) -> list[Planned]:
        """Planned experiments that have not finished."""
        return [planned for planned in self.planned if planned.seed not in self.runs]

    @property
    def settings(self) -> Any:
        """The experiment's settings, the same for all seeds."""
        return next(iter(self.runs.values()))["settings"]

    @property
    def victim(self) -> Mapping[str, Any]:
        """The victims' settings: layer, k, metric, convention."""
        settings: Mapping[str, Any] = self.settings["victim"]
        return settings

    @property
    def notes(self) -> list[str]:
        """What qualifies all numbers: unofficial files; by seed and network, approximate neighbours."""
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
        """The backbone and its surrogates by name, without transfer networks."""
        found = {name: _method(name, training) for name, training in self.settings["trainings"].items()}
        return {name: method for name, method in found.items() if method.layer or name == "origin"}

    @property
    def networks(self) -> list[str]:
        """The transfer networks in Table 3."""
        return list(dict.fromkeys(str(line["network"]) for line in self.table("table3")))

    def table(self, name: str) -> list[Record]:
        """Lines of ``<name>.csv`` of finished seeds.

        Raises:
            ValueError: If they have changed since, or the file is damaged.
        """
        path = self.folder / f"{name}.csv"
        check_seeds(path, {seed: run.get("tables", {}).get(name) for seed, run in self.runs.items()})
        return [line for line in read_csv(path) if str(line["seed"]) in map(str, self.runs)]

    def function(self, attack: str) -> str:
        """An attack's function; ``clean`` has none and is returned as it is."""
        return "clean" if attack == "clean" else str(self.settings["attacks"][attack]["function"])

    def measurements(self, network: str | None = None) -> list[Measurement]:
        """Cells of Table 2, or with a transfer network of Table 3, in order of first appearance."""
        records = self.table("table3" if network else "table2")
        own = [record for record in records if network in (None, record.get("network"))]
        found = []
        for (victim, method, attack, eps), lines in lines_by_cell(own, "victim", "method", "attack", "eps"):
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

    def attacked(self, network: str | None = None) -> list[Measurement]:
        """`measurements` without those of clean images."""
        return [each for each in self.measurements(network) if not each.clean]


def load(plan: Plan, results: Path) -> list[Results]:
    """Read the results of a grid, in its order, also of experiments that have none yet.

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
            for variation, own in grouped(planned, lambda each: each.variation).items():
                folder = results / data if part == "tables" else results / data / part / variation
                found.append(Results(data, part, variation, folder, tuple(own), _summaries(folder)))
    return found


def lines_by_cell(records: Sequence[Record], *names: str) -> list[tuple[tuple[str, ...], list[Record]]]:
    """Records of each cell over seeds, in order of first appearance."""
    return list(grouped(records, lambda record: tuple(str(record[name]) for name in names)).items())


def paper_of(lines: Sequence[Record]) -> float | None:
    """The paper's number beside a cell."""
    return None if lines[0]["paper"] is None else number(lines[0], "paper")


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
