"""Sections of text, tables and pictures as one HTML page or as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

Lines = tuple[str, ...]
"""A cell: one line below the other."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Args:
        caption: What it shows.
        header: Names of columns.
        rows: Cells.
        headings: How many leading cells name a row.
        anchors: Where links to a row go; empty for none.
        sources: Names of the results that it was made from.
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
class Picture:
    """A figure whose files ``<name>.png`` and ``<name>.pdf`` lie beside the page.

    Args:
        name: Of the files, without suffix.
        caption: What it shows.
        alt: What someone who cannot see it should know.
        png: The picture, in base64.
        sources: Names of the results that it was made from.
    """

    name: str
    caption: str
    alt: str
    png: str
    sources: Sequence[str] = ()

    kind = "picture"


Block = str | Table | Picture


@dataclass(frozen=True)
class Section:
    """A part of the page. Words between backticks are code."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def render_html(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """One page that needs no other file."""
    return _render("report.html", title, introduction, sections)


def render_markdown(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """The same as Markdown, which links to the pictures' files."""
    return _render("report.md", title, introduction, sections)


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown; lines of a cell stand below each other."""
    header = [_cell((name,)) for name in table.header]
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render(template: str, title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=PackageLoader("lightning_advknn.reports"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": anchor,
        "markdown": _markdown,
        "markdown_table": markdown_table,
        "plain": lambda text: text.replace("`", ""),
    }
    page = environment.get_template(template)
    return page.render(title=title, introduction=introduction, sections=sections)


def _markdown(text: str) -> str:
    """Text whose only markup are its backticks."""
    parts = text.split("`")
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _cell(lines: Lines) -> str:
    return "<br>".join(_markdown(line).replace("|", r"\|") for line in lines)


def anchor(name: str) -> str:
    """Where links to an experiment go."""
    return "made-" + "".join(letter if letter.isalnum() else "-" for letter in name)
