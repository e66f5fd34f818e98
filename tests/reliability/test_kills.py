"""Damaged files and killed runs, a few of those that ``benchmarks.mutations`` and ``benchmarks.kills`` try by the hundred."""

import csv
import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks import kills, mutants, mutations
from benchmarks.forks import Fork, Outcome

# The runs are forks of this process, in which no other thread holds a lock that they need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_damaged_files_are_told_or_do_no_harm(tmp_path: Path) -> None:
    arguments = ["--kinds", "checkpoint", "bank", "adversarials", "idx", "--only", "2", "--seed", "5"]
    code = mutations.main([*arguments, "--output", str(tmp_path)])
    found = lines(tmp_path / "mutations.csv")
    assert [line["kind"] for line in found] == ["checkpoint"] * 2 + ["bank"] * 2 + ["adversarials"] * 2 + [
        "idx"
    ] * 2
    assert [line for line in found if line["ok"] != "True"] == []
    assert code == 0


def test_killed_runs_go_on(tmp_path: Path) -> None:
    code = kills.main(["--kills", "2", "--seed", "1", "--output", str(tmp_path), "--disk", "enough"])
    found = lines(tmp_path / "kills.csv")
    assert [(line["resumed"], line["equal"]) for line in found] == [("True", "True")] * 2
    assert code == 0


def test_landed_outcomes_are_good() -> None:
    folder = Path(__file__).parents[2] / "results" / "reliability"
    damaged, killed = lines(folder / "mutations.csv"), lines(folder / "kills.csv")
    assert tuple(damaged[0]) == mutations.COLUMNS
    assert tuple(killed[0]) == kills.COLUMNS
    assert len(damaged) >= 200
    assert {line["kind"] for line in damaged} == set(mutations.KINDS)
    assert {line["ok"] for line in damaged} == {"True"}
    assert len([line for line in killed if line["signal"] == "SIGKILL"]) >= 50
    assert "ENOSPC" in {line["signal"] for line in killed}
    assert {(line["resumed"], line["equal"]) for line in killed} == {("True", "True")}


RIGHT = ({"k": 1}, [0.5])


@pytest.mark.parametrize(
    ("outcome", "answer", "harmed", "good"),
    [
        (Outcome(0, "", 1.0), RIGHT, False, True),
        (Outcome(0, "", 1.0), ({"k": 2}, [0.25]), False, True),
        (Outcome(0, "", 1.0), ({"k": 1}, [0.25]), False, False),
        (Outcome(0, "", 1.0), RIGHT, True, False),
        (Outcome(0, "", 1.0), None, False, False),
        (Outcome(2, "attack.py: error: Expected", 1.0), None, False, True),
        (Outcome(2, "", 1.0), None, False, False),
        (Outcome(1, "Traceback (most recent call last)\nKeyError: 'error:'", 1.0), None, False, False),
        (Outcome(-11, "error: Segmentation fault", 1.0), None, False, False),
        (Outcome(None, "error:", 1.0), None, False, False),
    ],
)
def test_outcomes_are_judged(
    outcome: Outcome, answer: mutations.Answer | None, harmed: bool, good: bool
) -> None:
    assert mutations.judge(outcome, answer, RIGHT, harmed)[1] == good


def test_mutants_of_bytes_are_each_another_file() -> None:
    whole = bytes(range(90))
    random = Random(0)  # noqa: S311  # chooses bits, and guards nothing
    contents = [mutant.content for mutant in mutants.of_bytes(whole, random, flips=5)]
    assert whole not in contents
    assert mutants.flipped(b"\x00\x00", 9) == b"\x00\x02"
    assert list(mutants.places({"a": [1, {"b": 2}]})) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert mutants.changed({"a": [1, 2]}, ("a", 0), "x") == {"a": ["x", 2]}


def _look_about(args: list[str]) -> int:
    sys.stderr.write(f"{args} in {Path.cwd().name}")
    while args == ["sleep"]:
        signal.pause()
    return len(args)


def test_a_fork_is_a_run(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = Fork(_look_about, ["a", "b", "c"], home, tmp_path).wait(20)
    assert (done.code, done.errors) == (3, "['a', 'b', 'c'] in home")
    late = Fork(_look_about, ["sleep"], home, tmp_path).wait(0.5)
    assert late.code is None
    killed = Fork(_look_about, ["sleep"], home, tmp_path, watched=True)
    while "_look_about" not in killed.functions():
        os.sched_yield()
    assert killed.send(signal.SIGTERM)
    assert killed.wait(20).code == -signal.SIGTERM
    assert not killed.send(signal.SIGTERM)
