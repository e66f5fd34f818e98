"""Tables on the terminal."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table as Columns

from lightning_advknn.reports.records.csv_files import Record
from lightning_advknn.reports.render.page import Table


def print_table2(records: Sequence[Record], title: str) -> None:
    """Show accuracies as the paper's Table 2 does: ours, the paper's in brackets, then true L2 and credibility."""
    attacks = list(dict.fromkeys(str(record["attack"]) for record in records))
    table = Columns(
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
    table = Columns(title=title, box=None)
    table.add_column("classifier")
    table.add_column("accuracy % (paper's)", justify="right")
    for record in records:
        table.add_row(str(record["victim"]), _accuracy(record))
    Console().print(table)


def print_table3(records: Sequence[Record], title: str) -> None:
    """Show accuracies on other networks as the paper's Table 3 does: ours, the paper's in brackets."""
    table = Columns(title=title, caption="accuracy % (paper's)", box=None)
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


def print_table(table: Table) -> None:
    """Show a table, one word of a heading a line: a terminal has few columns."""
    columns = Columns(title=table.caption, box=None, title_justify="left")
    for position, name in enumerate(table.header):
        side: Literal["left", "right"] = "left" if table.prose or position < table.headings else "right"
        # One word a line: a terminal has few columns.
        columns.add_column(name if table.prose else name.replace(" ", "\n"), justify=side, overflow="fold")
    for row in table.rows:
        columns.add_row(*("\n".join(cell) for cell in row))
    Console().print(columns)
