"""Wall time and peak memory of a function, also in a child process.

A child is ``python -m benchmarks.measure MODULE FUNCTION``. It reads the function's arguments from standard
input and writes its result to the last line of standard output, both as JSON.
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

_PATIENCE = 60.0  # seconds after which no repeat starts


def timed(function: Callable[[], T], repeats: int = 1) -> tuple[T, dict[str, float]]:
    """Time a function.

    Args:
        function: The function.
        repeats: Largest number of repeats; a slow function runs less often.

    Returns:
        Its last result; and ``seconds`` (median), ``spread`` (range relative to the median),
        ``repeats`` and the process's ``peak_mib`` so far.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < _PATIENCE):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, summarized(seconds)


def summarized(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread of wall times, as `timed` returns them."""
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "repeats": len(seconds),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Peak memory of this process, with Python and all imports."""
    # On Linux, `ru_maxrss` of a child includes its parent's peak, but the kernel's own count does not.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_child(module: str, function: str, threads: int, **arguments: Any) -> Any:
    """Run a function in a new process.

    Args:
        module: Module of the function.
        function: Its name; its arguments and result are plain values, as in JSON.
        threads: Number of threads of each library.
        **arguments: Its arguments.

    Raises:
        RuntimeError: If it fails; its output is on standard error.
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
            f"Expected {module}.{function} to succeed, but it ended with exit code {done.returncode}; its"
            " error is above."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    module, function = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    _main()
