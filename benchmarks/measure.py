"""Wall time with its spread, and peak memory: of one case at a time, in a process of its own.

A child process is ``python -m benchmarks.measure MODULE FUNCTION`` with the function's arguments as JSON on standard
input; what it returns is the last line of its standard output.
"""

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = 60.0  # seconds of repeats, after which one is enough


def timed(function: Callable[[], T], repeats: int = 1) -> tuple[T, dict[str, float]]:
    """A function's last result, and its time.

    Args:
        function: What is timed.
        repeats: How often it runs at most; a long one runs less often.

    Returns:
        The result, and ``seconds`` (the median), ``spread`` (largest less smallest, relative to the median), ``repeats``
        (how often it ran) and ``peak_mib`` of the process so far.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < _PATIENCE):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, summarized(seconds)


def summarized(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread of some wall times, as `timed` returns them."""
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "repeats": len(seconds),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """The most memory that this process has held, with Python and all it imports."""
    # `ru_maxrss` of a child starts from its parent's peak on Linux: there the kernel's own count is right.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_child(module: str, function: str, threads: int, **arguments: Any) -> Any:
    """What a function returns that runs alone in a fresh process.

    Args:
        module: Its module.
        function: Its name; it takes and returns what JSON can hold.
        threads: How many each library may use.
        **arguments: Its arguments.

    Raises:
        RuntimeError: If it fails; what it printed has gone to standard error.
    """
    repository = str(Path(__file__).resolve().parents[1])
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", module, function],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **limits, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"Expected {module}.{function} to succeed, but it ended with {done.returncode}; the reason is above."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    module, function = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    _main()
