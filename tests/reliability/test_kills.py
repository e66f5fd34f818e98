"""Killed runs resume and end with equal results; `reliability.kills` tries many more."""

import ast
import csv
from pathlib import Path

import pytest

from reliability import kills

# Runs are forks of this process. No other thread holds a lock that they need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_killed_runs_resume(tmp_path: Path) -> None:
    code = kills.main(["--kills", "2", "--seed", "1", "--output", str(tmp_path), "--disk", "enough"])
    found = lines(tmp_path / "kills.csv")
    assert [(line["resumed"], line["equal"]) for line in found] == [("True", "True")] * 2
    assert code == 0


def test_stages_name_functions_of_the_package() -> None:
    files = [*(ROOT / "lightning_advknn").rglob("*.py"), ROOT / "attack.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {name for names in kills._STAGES.values() for name in names} <= functions


def test_landed_kills_are_good() -> None:
    killed = lines(ROOT / "results" / "reliability" / "kills.csv")
    assert tuple(killed[0]) == kills.COLUMNS
    assert len([line for line in killed if line["signal"] == "SIGKILL"]) >= 50
    assert "ENOSPC" in {line["signal"] for line in killed}
    assert {(line["resumed"], line["equal"]) for line in killed} == {("True", "True")}
