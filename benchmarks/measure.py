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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = 60.0  # seconds after which no repeat starts
FORCING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Environment variables that force OpenBLAS to a kernel, on some machines to a slow one."""


def timed(function: Callable[[], T], repeats: int = 1) -> tuple[T, dict[str, float]]:
    """Time a function.

    Args:
        function: The function.
        repeats: Largest number of repeats; a slow function runs less often.

    Returns:
        Its last result; and times as `summarized` returns them, with the process's ``peak_mib`` so far.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < _PATIENCE):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, {**summarized(seconds), "peak_mib": peak_mib()}


def summarized(seconds: Sequence[float]) -> dict[str, float]:
    """Wall times: ``seconds`` (median), ``min``, ``max``, ``spread`` (range by median) and ``repeats``."""
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    spread = (most - least) / median if median else 0.0
    return {"seconds": median, "min": least, "max": most, "spread": spread, "repeats": len(seconds)}


def peak_mib() -> float:
    """Peak memory of this process, with Python and all imports."""
    # On Linux, `ru_maxrss` of a child includes its parent's peak, but the kernel's own count does not.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_child(
    module: str,
    function: str,
    threads: int,
    variables: Mapping[str, str] | None = None,
    quiet: bool = False,
    **arguments: Any,
) -> Any:
    """Run a function in a new process, in which libraries choose their kernels (without `FORCING`).

    Args:
        module: Module of the function.
        function: Its name; its arguments and result are plain values, as in JSON.
        threads: Number of threads of each library.
        variables: Further environment variables of the process.
        quiet: Whether its errors are not shown.
        **arguments: Its arguments.

    Raises:
        RuntimeError: If it fails; its output is on standard error.
    """
    repository = str(Path(__file__).resolve().parents[1])
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    free = {name: value for name, value in os.environ.items() if name not in FORCING}
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", module, function],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
        env={**free, **limits, "PYTHONPATH": path, **(variables or {})},
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
