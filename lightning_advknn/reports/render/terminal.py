"""Tables on the terminal."""

from typing import Literal

from rich.console import Console
from rich.table import Table as Columns
from rich.text import Text

from lightning_advknn.reports.render.blocks import Table


def print_table(table: Table) -> None:
    """Print a table below its caption."""
    columns = Columns(box=None)
    for position, name in enumerate(table.header):
        side: Literal["left", "right"] = "left" if table.prose or position < table.headings else "right"
        # One word a line: a terminal has few columns.
        title = name if table.prose else name.replace(" ", "\n")
        columns.add_column(Text(title), justify=side, overflow="fold")
    for row in table.rows:
        columns.add_row(*(Text("\n".join(cell)) for cell in row))
    console = Console()
    console.print(Text(table.caption, style="italic"))
    console.print(columns)
