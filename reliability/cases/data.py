"""Data sets."""

from pathlib import Path

from reliability.case import Case, Outcome, evaluate, small_experiment


def _plain(folder: Path) -> Outcome:
    small_experiment(folder)
    ran = evaluate(folder)
    return Outcome(f"exit {ran.code}; {ran.err[-300:]}", ran.code == 0)


CASES = [
    Case("data-plain", "A folder of images as it should be.", "Tables, exit code 0.", _plain),
]
