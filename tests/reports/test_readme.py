"""The README's tables are generated, never typed."""

import json
import re
from pathlib import Path

import pytest

from lightning_advknn.reports.readme import render
from lightning_advknn.reports.tables import TABLE1, TABLE2, write_csv

REPOSITORY = Path(__file__).parents[2]


def test_readme_has_what_results_have() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert render(readme, REPOSITORY / "results") == readme, "run `python -m lightning_advknn.reports.readme`"


def test_means_over_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    write_csv(
        folder / "table1.csv",
        TABLE1,
        [
            {"victim": "knn", "accuracy": accuracy, "paper": 98.98, "n": 9250, "seed": seed}
            for seed, accuracy in enumerate((98.0, 99.0))
        ],
    )
    cell = {
        "victim": "knn",
        "method": "mine",
        "attack": "bim",
        "eps": 0.1,
        "l2_mean": 2,
        "credibility_mean": 0.5,
    }
    write_csv(
        folder / "table2.csv",
        TABLE2,
        [
            {**cell, "accuracy": accuracy, "paper": None, "l2_mean_success": None, "n": 9250, "seed": seed}
            for seed, accuracy in enumerate((1.0, 3.0))
        ],
    )
    settings = {"victim": {"k": 75, "convention": "strict"}, "label_source": "knn"}
    for seed in (0, 1):
        run = {
            "command": f"python attack.py {seed}",
            "device": "cpu",
            "date": "2026-01-01",
            "settings": settings,
        }
        (folder / f"seed{seed}.json").write_text(json.dumps(run))
    text = render("a\n<!-- results -->old<!-- /results -->\nb", tmp_path)
    assert text.startswith("a\n<!-- results -->\n### MNIST\n")
    assert text.endswith("<!-- /results -->\nb")
    # By hand: mean 98.5, sample standard deviation of (98, 99) .71; 2 and 1.41.
    assert "| knn | 98.50 ± 0.71 | 98.98 |" in text
    assert "| knn | mine | bim | 0.1 | 2.00 ± 1.41 | - | 2.00 ± 0.00 | - | 0.50 ± 0.00 |" in text
    assert "over seeds [0, 1]" in text
    assert "`python attack.py 1` (cpu, 2026-01-01)" in text
    assert "### SVHN\n\nNot run yet" in text
    assert "old" not in text


def test_missing_markers_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected the markers"):
        render("nothing", tmp_path)


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall("```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.count("tensor([") == 2
