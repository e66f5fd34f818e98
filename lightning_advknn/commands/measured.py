"""What an experiment's rows say: the paper's tables, metrics, and rows for pictures."""

from collections.abc import Sequence
from typing import Any

from lightning_advknn.commands.steps import note_on, saved_rows
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.reports.records.csv_files import CsvTable, Record, with_note
from lightning_advknn.reports.records.paper_records import (
    COLUMNS,
    attacked_records,
    clean_records,
    shown,
    transfer_records,
)
from lightning_advknn.reports.records.summaries import credibility_of, metrics_of, which_images
from lightning_advknn.reports.render.terminal import print_table


class Measured:
    """Gathers what rows say, attack by attack.

    Args:
        run: The experiment, filled.
    """

    def __init__(self, run: ExperimentRun) -> None:
        self.run = run
        self.metrics: dict[str, Any] = {}
        """By ``<method>/<attack>``, as `metrics_of`."""
        self.credibility: dict[str, Any] = {}
        """The same, as `credibility_of`."""
        self.pictured = [method for method, attack in run.attacks if attack][-1]
        """The method whose attacks are pictured: the last."""
        self.pictured_rows: dict[str, Rows] = {}
        """Its rows by attack, first those of clean images."""
        self._clean: dict[str, Rows] = {}
        self._attacked: list[Record] = []

    def add(self, method: str, attack: str | None, rows: Rows) -> None:
        """Add an attack through a method, or a method's clean images."""
        data, experiment = self.run.data.name, self.run.experiment
        self._attacked += attacked_records(data, experiment, method, attack, rows)
        name = f"{method}/{attack or 'clean'}"
        self.metrics[name], self.credibility[name] = metrics_of(rows), credibility_of(rows)
        if attack is None:
            self._clean[method] = rows
        if attack is None or method == self.pictured:
            self.pictured_rows[attack or "clean"] = rows

    def tables(self) -> list[CsvTable]:
        """Tables 1 and 2, and with transfer networks Table 3."""
        note = note_on(self.run)
        clean = clean_records(self.run.data.name, self.run.experiment, self._clean)
        found = {
            "table1": with_note(clean, note),
            "table2": with_note(self._attacked, note),
            "table3": _transferred(self.run),
        }
        return [CsvTable(name, COLUMNS[name], records) for name, records in found.items() if records]


def print_tables(run: ExperimentRun, tables: Sequence[CsvTable]) -> None:
    """Print an experiment's tables, the paper's numbers beside ours."""
    settings, note = run.describe(), note_on(run)
    which = f"\n{which_images(settings, len(run.test))}" if "images" in settings else ""
    for table in tables:
        title = f"Table {table.name[-1]}, {run.data.name}, seed {run.experiment.seed}: accuracy % (paper's)"
        more = "; mean true L2 and mean credibility over all images" if table.name == "table2" else ""
        own = f"\n{note}" if note and table.name != "table3" else ""
        print_table(shown(table.name, table.records, f"{title}{more}{which}{own}"))


def _transferred(run: ExperimentRun) -> list[Record]:
    """Table 3: the transfer networks on the adversarials made for the attacked one."""
    records = []
    for network in run.transfers:
        for method, attack in ((ORIGIN, None), *(pair for pair in run.attacks if pair[1])):
            rows = saved_rows(run, method, attack, network)
            own = transfer_records(run.data.name, run.experiment, network, method, attack, rows)
            records += with_note(own, note_on(run, network))
    return records
