"""The page of a leaderboard, and leaderboards in the report."""

import base64
from pathlib import Path

import pytest

from lightning_advknn.reports.leaderboards.page import leaderboards_section, print_board, write_page
from lightning_advknn.reports.leaderboards.tables import attacks_table
from lightning_advknn.reports.render.blocks import Illustration, Table
from lightning_advknn.reports.render.page import _markdown_table
from tests.reports.leaderboards.boards import ENTRIES, write_board


def test_the_page_has_tables_checks_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = write_board(tmp_path, ENTRIES, (0, 1))
    write_page(board, tmp_path)
    page = (tmp_path / "leaderboard.md").read_text()
    assert page.startswith("# Leaderboard, Fashion-MNIST\n")
    for victim, title in (("dknn", "DkNN"), ("knn/relu3", "kNN on relu3"), ("dnn", "DNN")):
        assert f"## {title}\n" in page
        assert _markdown_table(attacks_table(board, victim)) in page
    for mark in ("✓ holds", "✗ does not hold", "- not looked at"):
        assert page.count(f"| it is sound | {mark} | 2 things |") == 2
    assert "](leaderboard.png)" in page
    assert "`python attack.py leaderboard`, 100 test images, 2 CPU cores, 2026-11-23." in page
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "leaderboard.pdf").read_bytes().startswith(b"%PDF")
    print_board(write_board(tmp_path, ENTRIES), 0)
    said = capsys.readouterr().out
    assert all(name in said for name in ("worst", "least", "bim", "fgsm", "median"))
    assert said.count("it is sound") == 3


def test_the_report_has_every_leaderboard_in_brief(tmp_path: Path) -> None:
    results, output = tmp_path / "results", tmp_path / "report"
    output.mkdir()
    assert leaderboards_section(results, output).blocks == ["None has run."]
    boards = []
    for place, strength in (("fashion_mnist", 50.0), ("fashion_mnist/pixels", 20.0)):
        (results / place).mkdir(parents=True)
        boards.append(write_board(results / place, {"bim, origin": (strength, False)}))
    blocks = leaderboards_section(results, output).blocks
    assert [block for block in blocks if isinstance(block, Table)] == [
        attacks_table(board, "dknn", brief=True) for board in boards
    ]
    pictures = [block for block in blocks if isinstance(block, Illustration)]
    assert [picture.name for picture in pictures] == [
        "fashion_mnist-leaderboard",
        "fashion_mnist-pixels-leaderboard",
    ]
    for picture in pictures:
        assert base64.b64decode(picture.png) == (output / f"{picture.name}.png").read_bytes()
        assert (output / f"{picture.name}.pdf").is_file()
    said = " ".join(block for block in blocks if isinstance(block, str))
    assert "`fashion_mnist/leaderboard.csv`" in said
    assert "`fashion_mnist/pixels/leaderboard.csv`" in said
    assert said.count("`python attack.py leaderboard`, 100 test images") == 2
