"""Damaged files give an error or the right answer; `reliability.mutations` tries many more."""

import csv
from pathlib import Path

import pytest

from reliability import mutations
from reliability.forks import Exit

# Runs are forks of this process. No other thread holds a lock that they need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_damaged_files_give_an_error_or_the_right_answer(tmp_path: Path) -> None:
    arguments = ["--kinds", "checkpoint", "bank", "adversarials", "idx", "--only", "2", "--seed", "5"]
    code = mutations.main([*arguments, "--output", str(tmp_path)])
    found = lines(tmp_path / "mutations.csv")
    assert [line["kind"] for line in found] == ["checkpoint"] * 2 + ["bank"] * 2 + ["adversarials"] * 2 + [
        "idx"
    ] * 2
    assert [line for line in found if line["ok"] != "True"] == []
    assert code == 0


def test_landed_mutations_are_good() -> None:
    folder = Path(__file__).parents[2] / "results" / "reliability"
    damaged = lines(folder / "mutations.csv")
    assert tuple(damaged[0]) == mutations.COLUMNS
    assert len(damaged) >= 200
    assert {line["kind"] for line in damaged} == set(mutations.KINDS)
    assert {line["ok"] for line in damaged} == {"True"}


RIGHT = ({"k": 1}, [0.5])


@pytest.mark.parametrize(
    ("ended", "answer", "harmed", "good"),
    [
        (Exit(0, "", 1.0), RIGHT, False, True),
        (Exit(0, "", 1.0), ({"k": 2}, [0.25]), False, True),
        (Exit(0, "", 1.0), ({"k": 1}, [0.25]), False, False),
        (Exit(0, "", 1.0), RIGHT, True, False),
        (Exit(0, "", 1.0), None, False, False),
        (Exit(2, "attack.py: error: Expected", 1.0), None, False, True),
        (Exit(2, "", 1.0), None, False, False),
        (Exit(1, "Traceback (most recent call last)\nKeyError: 'error:'", 1.0), None, False, False),
        (Exit(-11, "error: Segmentation fault", 1.0), None, False, False),
        (Exit(None, "error:", 1.0), None, False, False),
    ],
)
def test_outcomes_are_judged(ended: Exit, answer: mutations.Answer | None, harmed: bool, good: bool) -> None:
    assert mutations.judge(ended, answer, RIGHT, harmed)[1] == good
