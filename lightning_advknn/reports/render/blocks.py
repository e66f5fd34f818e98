"""What a page or a terminal shows: sections of text, tables and pictures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Lines = tuple[str, ...]
"""A cell: its lines, from top to bottom."""


@dataclass(frozen=True)
class Table:
    """A table of text. Words between backticks are code, here and in all that is shown.

    Args:
        caption: What the table shows.
        header: Names of columns.
        rows: Cells.
        headings: How many leading cells name a row.
        anchors: Targets for links to each row; empty for none.
        sources: Names of the results that the table was made from.
        prose: Whether cells are sentences rather than numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Lines]]
    headings: int = 1
    anchors: Sequence[str] = ()
    sources: Sequence[str] = ()
    prose: bool = False

    kind = "table"


@dataclass(frozen=True)
class Illustration:
    """A figure. Its files ``<name>.png`` and ``<name>.pdf`` lie beside the page.

    Args:
        name: Of the files, without suffix.
        caption: What the figure shows.
        alt: What a reader who cannot see it should know.
        png: The figure as PNG, in base64.
        sources: Names of the results that the figure was made from.
    """

    name: str
    caption: str
    alt: str
    png: str
    sources: Sequence[str] = ()

    kind = "picture"

    @classmethod
    def of_file(cls, path: Path, caption: str, alt: str, sources: Sequence[str] = ()) -> "Illustration":
        """The figure in ``<path>.png``."""
        png = path.with_name(f"{path.name}.png").read_bytes()
        return cls(path.name, caption, alt, base64.b64encode(png).decode("ascii"), sources)


Block = str | Table | Illustration


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]
