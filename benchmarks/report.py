"""What all benchmarks share: options, the experiment, and results."""

import argparse
import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from lightning_advknn.experiment.device import provenance
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.storage import write_json

OURS = "lightning_advknn"
Record = dict[str, Any]

_COLUMNS = (
    "device",
    "case",
    "method",
    "seconds",
    "peak_mib",
    "exact",
    "ratio",
    "min",
    "max",
    "spread",
    "repeats",
    "threads",
)
_CPU = torch.device("cpu")
_PEERS = ("faiss-cpu", "faiss-gpu", "scikit-learn", "torchattacks", "foolbox")


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="A few images of the embedded digits, in a minute or two."
    )
    parser.add_argument(
        "--config", help="Experiment; configs/mnist/attack.yaml, or configs/digits/attack.yaml if quick."
    )
    parser.add_argument("--root", help="Folder of the data files.")
    parser.add_argument(
        "--backbone", help="Checkpoint of a trained backbone; by default, one is trained and cached."
    )
    parser.add_argument(
        "--output", help="Folder for the results; results/benchmarks, or runs/benchmarks if quick."
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="Threads of each method; %(default)s."
    )
    return parser


def parse(parser: argparse.ArgumentParser, args: Sequence[str] | None) -> argparse.Namespace:
    """Parse, fill in defaults that depend on `quick`, and set the number of threads."""
    given = parser.parse_args(args)
    file = Path(sys.argv[0])
    module = file.parent.name if file.stem == "__main__" else file.stem
    given.command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    given.config = given.config or f"configs/{'digits' if given.quick else 'mnist'}/attack.yaml"
    given.output = given.output or ("runs/benchmarks" if given.quick else "results/benchmarks")
    torch.set_num_threads(given.threads)
    return given


def experiment(
    config: str, root: str | None, backbone: str | None, surrogate: str | None = None
) -> Experiment:
    """An experiment on the CPU, without surrogates unless a checkpoint is given.

    Args:
        config: YAML file of the experiment.
        root: Folder of the data files; None for the configuration's.
        backbone: Checkpoint to load instead of training.
        surrogate: Checkpoint of the experiment's last surrogate.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Experiment)
    arguments = [f"--config={config}", "--device=cpu"]
    arguments += [f"--root={root}"] if root else []
    arguments += [f"--backbone.checkpoint={backbone}"] if backbone else []
    parsed = parser.parse_args(arguments)
    name = list(parsed.surrogates)[-1]
    chosen = {name: parsed.surrogates[name]} if surrogate else {}
    for trained in chosen.values():
        trained.checkpoint = surrogate
    parsed.surrogates = chosen
    made = parser.instantiate(parsed)
    return Experiment(**{field: getattr(made, field) for field in Experiment.__dataclass_fields__})


def device() -> str:
    """Number and name of the processors, as far as known."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def with_ratios(records: Sequence[Record]) -> list[Record]:
    """Records by case, with their time relative to ours in the same case: 2 is twice as long."""
    cases = list(dict.fromkeys(record["case"] for record in records))
    records = sorted(records, key=lambda record: cases.index(record["case"]))
    ours = {record["case"]: record.get("seconds") for record in records if record["method"] == OURS}

    def ratio(record: Record) -> float | None:
        seconds, base = record.get("seconds"), ours.get(record["case"])
        return seconds / base if seconds and base else None

    return [{**record, "ratio": ratio(record)} for record in records]


def publish(
    name: str,
    records: Sequence[Record],
    given: argparse.Namespace,
    settings: Mapping[str, Any],
    *further: str,
    on: torch.device = _CPU,
) -> None:
    """Print records, and `write` them; the same arguments."""
    lines, columns = write(name, records, given, settings, *further, on=on)
    shown = [column for column in columns if column not in ("device", "threads")]
    where = device() if on.type == "cpu" else torch.cuda.get_device_name(on)
    _show(f"{name}: {where}, {given.threads} threads", lines, shown)
    output = Path(given.output)
    sys.stdout.write(f"Written to {output / name}.csv and .json\n")


def write(
    name: str,
    records: Sequence[Record],
    given: argparse.Namespace,
    settings: Mapping[str, Any],
    *further: str,
    on: torch.device = _CPU,
) -> tuple[list[Record], list[str]]:
    """Write records to ``<output>/<name>.csv``, and their provenance to ``<name>.json``.

    Args:
        name: Name of the benchmark.
        records: Records; missing values stay empty.
        given: The parsed options.
        settings: What was measured.
        further: Columns besides those of all benchmarks.
        on: Where it was measured.

    Returns:
        The lines and columns of the file.
    """
    columns = [*_COLUMNS, *further]
    shown = device() if on.type == "cpu" else torch.cuda.get_device_name(on)
    where = {"device": shown, "threads": given.threads}
    lines = [{column: _rounded({**where, **record}.get(column)) for column in columns} for record in records]
    output = Path(given.output)
    write_csv(output / f"{name}.csv", columns, lines)
    made = provenance(on)
    made["versions"] |= {peer: importlib.metadata.version(peer) for peer in _PEERS if _installed(peer)}
    how = {"command": given.command, "options": vars(given), "settings": settings, "commit": _commit()}
    write_json(output / f"{name}.json", {**how, **made, "device": shown})
    return lines, columns


def _show(title: str, lines: Sequence[Record], columns: Sequence[str]) -> None:
    """Print a table in which each case is named once."""
    table = Table(title=title, box=None, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in ("case", "method") else "right")
    last = None
    for line in lines:
        if line["case"] != last:
            table.add_section()
        cells = {**line, "case": "" if line["case"] == last else line["case"]}
        table.add_row(*("" if cells[column] is None else str(cells[column]) for column in columns))
        last = line["case"]
    Console(width=300).print(table)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def _commit() -> str | None:
    """The current commit, marked if files differ from it; None outside of a repository."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
