"""Sections as one HTML page or as Markdown."""

import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from lightning_advknn.reports.render.blocks import Lines, Section, Table


def render_html(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """One page that needs no other file."""
    return _render("report.html", title, introduction, sections)


def render_markdown(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """The same as Markdown, which links to the figures' files."""
    return _render("report.md", title, introduction, sections)


def _markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown, without its caption."""
    header = [_cell((name,)) for name in table.header]
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def captioned(table: Table) -> str:
    """A table in Markdown below its caption."""
    return f"{table.caption}\n\n{_markdown_table(table)}"


def with_marked(page: str, name: str, text: str) -> str:
    """A page with a text between its markers ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: If it has no such markers.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    found, replaced = re.subn(f"{first}.*{last}", lambda _: f"{first}\n{text}{last}", page, flags=re.DOTALL)
    if not replaced:
        raise ValueError(
            f"Expected the markers `{first}` and `{last}`, but the page has none. Add them where the text belongs."
        )
    return found


def anchor(name: str) -> str:
    """Target for links to a result."""
    return "made-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def _render(template: str, title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=PackageLoader("lightning_advknn.reports.render"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": anchor,
        "markdown": _markdown,
        "markdown_table": _markdown_table,
        "plain": lambda text: text.replace("`", ""),
    }
    page = environment.get_template(template)
    return page.render(title=title, introduction=introduction, sections=sections)


def _markdown(text: str) -> str:
    """Text with all markup escaped but its backticks."""
    parts = text.split("`")
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _cell(lines: Lines) -> str:
    return "<br>".join(_markdown(line).replace("|", r"\|") for line in lines)
