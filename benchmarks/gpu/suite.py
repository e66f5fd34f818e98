"""The tests that run on a GPU where there is one."""

import re
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from benchmarks import report
from benchmarks.gpu.clock import Record
from benchmarks.gpu.commands import run
from benchmarks.gpu.sizes import Sizes

_FOLDERS = ("functional", "search", "attacks", "models", "test_classifiers.py", "test_evaluation.py")
_LIMIT = 140.0


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield one record: time, tests ``checked``, and those that failed."""
    options = [
        "-o",
        "addopts=--import-mode=importlib",
        "-q",
        "--maxfail=40",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore:GPU available",
    ]
    options += ["-n", "8"] if find_spec("xdist") else []
    options += ["--timeout=60"] if find_spec("pytest_timeout") else []
    tests = [f"tests/{name}" for name in _FOLDERS]
    record, printed = run(["-m", "pytest", *options, "-k", device.type, *tests], _LIMIT)
    yield {"case": "tests on this device", "method": report.OURS, **record, **counts(printed)}


def counts(printed: str) -> Record:
    """What pytest counted: tests that passed or failed are ``checked``, failures and errors ``differing``."""
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)\b", printed)}
    wrong = sum(n for word, n in found.items() if word != "passed")
    return {"checked": sum(found.values()), "differing": wrong, "exact": not wrong} if found else {}
