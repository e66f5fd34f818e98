"""Commands of this project, run in a process of their own with a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.clock import Record

REPOSITORY = Path(__file__).resolve().parents[2]
_GRACE = 5.0  # seconds between asking a process to end and ending it


def run(command: Sequence[str], limit: float) -> tuple[Record, str]:
    """Run ``python command`` in the repository's root.

    Returns:
        ``seconds``, and ``failed`` if it did not end well; and all that it printed.
    """
    started = time.perf_counter()
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        failed = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s"
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        else:
            failed = f"exit code {code}" if code else None
        output.seek(0)
        printed = output.read()
    record: Record = {"seconds": time.perf_counter() - started}
    if failed:
        last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
        record["failed"] = f"{failed}: {last[:200]}"
    return record, printed
