"""All on one GPU, in at most 9 minutes: python -m benchmarks.gpu --root DIR.

Ceilings of the device, exact votes, queries of four layers, scans, BIM, repeated attacks, whole commands, the
MNIST experiment and the tests that run on a GPU: see `PARTS`. Each runs in its own process with a limit of
time, and each record is written to ``<output>/gpu.csv`` when it is measured, so a run that is killed leaves
what it has. What fails or is not done in time is a record with the reason in ``failed``. What a part prints
on standard error is in ``runs/benchmarks/gpu``.

``launches`` and ``syncs`` are kernels and graphs started, and waits for the GPU, of one call (of BIM: on one
batch). ``limit_share`` compares with the measured ceiling of the precision. ``rate`` is in 1e12 operations a
second, of a copy in GB/s. ``peak_mib`` is torch's memory on the GPU. ``repeated`` says whether a second run
gave the same, bit for bit. Without a GPU this says so and ends with exit code 2.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Timer

import torch

from benchmarks import report
from benchmarks.gpu.ceilings import PRODUCTS
from benchmarks.gpu.clock import Record
from benchmarks.gpu.commands import REPOSITORY
from benchmarks.measure import FORCING

PARTS = {
    "ceilings": 40.0,
    "votes": 60.0,
    "layers": 60.0,
    "bim": 80.0,
    "kernels": 50.0,
    "repeats": 50.0,
    "experiment": 180.0,
    "jobs": 160.0,
    "suite": 150.0,
}
"""Parts in the order in which they run, and seconds that each may take."""

_FURTHER = (
    "launches",
    "syncs",
    "limit_share",
    "rate",
    "differing",
    "checked",
    "success",
    "attacked_acc",
    "largest",
    "repeated",
    "part",
    "failed",
)
_LEAST = 10.0  # seconds that a part must have
_GRACE = 3.0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="Folder of MNIST's files, as torchvision lays them out.")
    parser.add_argument("--output", default="results/benchmarks", help="Folder for the results; %(default)s.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Only these.")
    parser.add_argument("--minutes", type=float, default=9.0, help="Time for all; %(default)s.")
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full", help="How much is measured.")
    given = parser.parse_args(args)
    if not torch.cuda.is_available():
        sys.stdout.write("Expected a GPU that torch can use, but there is none: nothing is measured.\n")
        return 2
    given.command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if args is None else args)])
    given.threads = torch.get_num_threads()
    given.root = str(Path(given.root).resolve()) if given.root else None
    device = torch.device("cuda")
    settings = {"sizes": given.sizes, "limits": PARTS, "minutes": given.minutes}
    records: list[Record] = []
    for record in run_parts(given.parts, given.minutes * 60, lambda part: _command(part, given)):
        records.append(record)
        report.write("gpu", finished(records), given, settings, *_FURTHER, on=device)
        sys.stdout.write(_line(record))
        sys.stdout.flush()
    report.publish("gpu", finished(records), given, settings, *_FURTHER, on=device)
    return 0


def _command(part: str, given: argparse.Namespace) -> list[str]:
    root = [given.root] if given.root else []
    return [sys.executable, "-m", "benchmarks.gpu.child", part, "cuda", given.sizes, *root]


def run_parts(
    parts: Sequence[str], seconds: float, command: Callable[[str], Sequence[str]]
) -> Iterator[Record]:
    """Records of all parts, as they come; none of a part for which too little time is left."""
    end = time.monotonic() + seconds
    for part in parts:
        limit = min(PARTS[part], end - time.monotonic() - _GRACE)
        if limit < min(_LEAST, PARTS[part]):
            yield {"case": part, "method": report.OURS, "part": part, "failed": "no time was left"}
            continue
        yield from ({**record, "part": part} for record in run_part(part, command(part), limit))


def run_part(part: str, command: Sequence[str], limit: float) -> Iterator[Record]:
    """Records that a process prints within a limit of time; the last says so if it did not end well."""
    log = Path("runs/benchmarks/gpu") / f"{part}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name not in FORCING}
    late: list[bool] = []
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**environment, "PYTHONPATH": path},
            start_new_session=True,
        ) as process,
    ):

        def end() -> None:
            late.append(True)
            _end(process)

        timer = Timer(limit, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                _end(process)
    reason = f"not done after {limit:.0f} s" if late else f"exit code {code}" if code else ""
    if reason:
        said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(said) if line), "")
        yield {"case": part, "method": report.OURS, "failed": f"{reason}: {last[:200]}".rstrip(": ")}


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and those that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def finished(records: Sequence[Record]) -> list[Record]:
    """Records with ratios, and shares of the ceilings that are among them."""
    square = next((r["case"] for r in records if r["method"] in PRODUCTS and r.get("rate")), None)
    peaks = {r["method"]: r["rate"] for r in records if r["case"] == square and r.get("rate")}
    found = []
    for record in records:
        made = dict(record)
        work = made.pop("work", None)
        if work and made.get("seconds") and all(ceiling in peaks for _, ceiling in work):
            least = sum(operations / peaks[ceiling] for operations, ceiling in work) / 1e12
            made["limit_share"] = least / made["seconds"]
        found.append(made)
    return report.with_ratios(found)


def _line(record: Record) -> str:
    shown = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in record.items()
        if key not in ("part", "case", "method", "work", "spread", "repeats")
    }
    return f"{record['case']} | {record['method']} | {shown}\n"


if __name__ == "__main__":
    sys.exit(main())
