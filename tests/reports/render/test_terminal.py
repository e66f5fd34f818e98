"""Tables on the terminal."""

import pytest

from lightning_advknn.reports.render.blocks import Table
from lightning_advknn.reports.render.terminal import print_table


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and a heading has one word a line."""
    print_table(Table("pixels in [0, 1], [bold]", ["a b", "c"], [[("x", "[/y]"), ("[red]z",)]]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["pixels", "in", "[0,", "1],", "[bold]"], ["a"], ["b", "c"], ["x", "[red]z"], ["[/y]"]]
