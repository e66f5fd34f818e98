"""Run field cases, which are inputs of users: python -m reliability.field [--only PATTERN]."""

import argparse
import csv
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

from lightning_advknn.storage import atomic_path
from reliability import cases
from reliability.case import Case, Outcome

COLUMNS = ("case", "input", "expected", "outcome", "ok")


def all_cases() -> list[Case]:
    """The cases of all modules, in order of module names."""
    names = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    return [case for name in names for case in import_module(f"{cases.__name__}.{name}").CASES]


def run(case: Case) -> Outcome:
    """Run a case in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = case.run(Path(folder))
        except Exception as error:  # the other cases still run
            outcome = Outcome(f"{type(error).__name__}: {error}", False)
    return outcome._replace(words=" ".join(outcome.words.replace(folder, "FOLDER").split()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="Pattern for names of cases.")
    parser.add_argument("--output", type=Path, default=Path("results/reliability/field.csv"))
    options = parser.parse_args(arguments)
    chosen = [case for case in all_cases() if fnmatch(case.case, options.only)]
    lines = []
    for case in chosen:
        words, ok = run(case)
        lines.append((case.case, case.input, case.expected, words, ok))
        sys.stdout.write(f"{'ok   ' if ok else 'WRONG'} {case.case}: {words}\n")
        sys.stdout.flush()
    with atomic_path(options.output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    good = sum(line[-1] for line in lines)
    sys.stdout.write(f"{good} of {len(lines)} cases are right; {options.output}\n")
    return 0 if good == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
