"""The README's tables are generated, never typed."""

from pathlib import Path
from types import ModuleType

import pytest

from lightning_advknn.reports.leaderboards.tables import attacks_table
from lightning_advknn.reports.paper.readme import _with_tables
from lightning_advknn.reports.render.page import _markdown_table
from tests.reports.leaderboards.boards import ENTRIES, write_board

REPOSITORY = Path(__file__).parents[3]


def test_readme_has_what_results_have() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert _with_tables(readme, REPOSITORY / "results") == readme, (
        "run `python -m lightning_advknn.reports.paper.readme`"
    )


def test_means_over_seeds(tmp_path: Path, folders: ModuleType) -> None:
    own = folders.settings(methods=folders.ORIGIN, attacks={"bim": folders.attack("bim", 0.1)})
    folders.write_results(
        tmp_path / "mnist", own, lambda v, m, a, seed: 98.0 + seed if a == "clean" else 1.0 + 2 * seed, (0, 1)
    )
    text = _with_tables("a\n<!-- results -->old<!-- /results -->\nb", tmp_path)
    assert text.startswith("a\n<!-- results -->\n### MNIST\n")
    assert text.endswith("<!-- /results -->\nb")
    # By hand: mean 98.5, sample standard deviation of (98, 99) .71; 2 and 1.41.
    assert "| MNIST | 98.50 ± 0.71 (2)<br>paper 99.17, -0.67 |" in text
    assert (
        "| kNN | Origin | 98.50 ± 0.71 (2)<br>paper 98.98, -0.48 | 2.00 ± 1.41 (2)<br>L2 4.50, cred. 0.25 |"
        in text
    )
    assert "9250 test images, seeds [0, 1]; k = 75" in text
    assert (
        f"`python attack.py evaluate --seed=1 --results={tmp_path}/mnist` (2 CPU cores (x86_64), 2026-11-23)"
        in text
    )
    assert "### SVHN\n\nNot run yet: `python attack.py evaluate --config configs/svhn/attack.yaml" in text
    assert "old" not in text
    assert "[report]" not in text


def test_the_report_is_linked_once_it_is_there(tmp_path: Path) -> None:
    report = tmp_path / "results" / "report" / "report.md"
    report.parent.mkdir(parents=True)
    report.touch()
    assert "[report](results/report/report.md)" in _with_tables(
        "<!-- results --><!-- /results -->", tmp_path / "results"
    )


def test_missing_markers_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected the markers"):
        _with_tables("nothing", tmp_path)


def test_the_readme_has_a_brief_leaderboard(tmp_path: Path, folders: ModuleType) -> None:
    results = tmp_path / "results"
    folders.write_results(results / "mnist", folders.settings(), lambda *_: 50.0)
    (results / "fashion_mnist").mkdir()
    board = write_board(results / "fashion_mnist", ENTRIES)
    text = _with_tables("<!-- results --><!-- /results -->", results)
    mnist, fashion = text.split("### Fashion-MNIST")
    assert "Leaderboard" not in mnist
    assert _markdown_table(attacks_table(board, "dknn", brief=True)) in fashion
    assert "](results/fashion_mnist/leaderboard.md)" in fashion
    assert "Leaderboard" not in fashion.split("### SVHN")[1]
