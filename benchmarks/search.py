"""Exact k nearest neighbours by cosine in real features: python -m benchmarks.search [--quick] [--root DIR].

Cases, for each layer of a trained backbone and for all together: preparing the bank, votes on clean and on
adversarial test images, and leave-one-out votes on the bank's rows. Methods: `MemoryBank` by default and in
float32; brute force in float32 by faiss, scikit-learn and plain torch; and the bare matrix product of the
same shape, which is the hardware's limit. A leave-one-out product serves both rows of a pair, so its share of
the limit can exceed 1.

A method is ``exact`` if its votes equal those of a float64 brute force on every query; ``differing`` counts
queries with other votes. Leave-one-out votes are compared on some rows (``checked``). Each method and layer
runs in its own process, whose peak memory includes Python, torch and the features.

Finally, all banks are built by `build_banks` within a memory limit, partly on disk, and searched.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import report, scans
from benchmarks.features import backbone_run, bank_batches, prepare
from benchmarks.measure import in_child, timed
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.build import BankSettings, build_banks

_LIMITS = {"limit_share": "bare product", "float32_limit_share": "bare float32 product"}
_FURTHER = (*_LIMITS, "precision", "differing", "checked", "measured_share")


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--layers", nargs="+", help="Only these layers.")
    parser.add_argument(
        "--rows",
        type=int,
        help="Leave-one-out queries of other libraries; their time is extrapolated to all rows.",
    )
    given = report.parse(parser, args)
    experiment = report.experiment(given.config, given.root, given.backbone)
    rows, queries, checked = (10_000, 200, 100) if given.quick else (None, 1000, 1000)
    run = backbone_run(experiment)
    files = prepare(run, Path("runs/benchmarks/features"), rows, queries, checked)
    files = {layer: file for layer, file in files.items() if layer in (given.layers or files)}
    size = sum(len(batch.labels) for batch in bank_batches(run, rows))
    queries = min(queries, len(run.test))
    label = f"{'quick, ' if given.quick else ''}{run.data.name}, {size} rows"
    records = []
    for layer, file in files.items():
        records += _compare(layer, file, given, experiment.victim.k, queries, label)
    records += _together(records, label)
    records += _on_disk(files, given, rows, queries, label)
    settings = {"experiment": run.describe(), "rows": size, "queries": queries}
    records = report.with_ratios(records)
    report.publish("search", records, given, settings, *_FURTHER)
    return records


def _compare(
    layer: str, file: Path, given: argparse.Namespace, k: int, queries: int, label: str
) -> list[report.Record]:
    """All methods on one layer."""
    cases = {
        "bank": "make ready",
        **{kind: f"{queries} {kind} queries" for kind in scans.QUERIES},
        "leave-one-out": "leave-one-out",
    }
    known = load_file(file)
    records: list[tuple[str, report.Record]] = []
    limits: dict[tuple[str, str], float] = {}
    for method in scans.METHODS:
        with tempfile.TemporaryDirectory() as folder:
            votes = Path(folder) / "votes.safetensors"
            times = in_child(
                "benchmarks.scans",
                "measure",
                given.threads,
                method=method,
                features=str(file.absolute()),
                votes=str(votes),
                k=k,
                repeats=3,
                rows=given.rows,
            )
            found = load_file(votes)
        fastest = times.pop("precision")
        for part, time in times.items():
            record = {"case": f"{label}: {layer}, {cases[part]}", "method": method, **time}
            if method.startswith("bare"):
                if part == "bank":
                    continue
                limits[part, method] = time["seconds"]
                record["precision"] = fastest if method == "bare product" else "float32"
            elif part != "bank":
                record |= _judge(found[part], known, part)
            records.append((part, record))
    for part, record in records:
        for column, method in _LIMITS.items():
            if part != "bank":
                record[column] = limits[part, method] / record["seconds"]
    return [record for _, record in records]


def _judge(votes: torch.Tensor, known: dict[str, torch.Tensor], case: str) -> report.Record:
    """Compare votes with the right ones."""
    right = known["checked_votes" if case == "leave-one-out" else f"{case}_votes"]
    if case == "leave-one-out":  # another library may have answered the first rows only
        there = known["checked"] < len(votes)
        votes, right = votes[known["checked"][there]], right[there]
    differing = int((votes != right).any(1).sum())
    return {"exact": differing == 0, "differing": differing, "checked": len(right)}


def _together(records: Sequence[report.Record], label: str) -> list[report.Record]:
    """Sums of times and differing votes over layers, and the largest peak."""
    groups: dict[tuple[str, str], list[report.Record]] = defaultdict(list)
    for record in records:
        groups[record["case"].split(", ")[-1], record["method"]].append(record)
    sums = []
    for (case, method), parts in groups.items():
        total: report.Record = {"case": f"{label}: all layers, {case}", "method": method}
        total["seconds"] = sum(part["seconds"] for part in parts)
        total["peak_mib"] = max(part["peak_mib"] for part in parts)
        total["spread"] = max(part["spread"] for part in parts)
        total["repeats"] = min(part["repeats"] for part in parts)
        for column in _LIMITS:
            if parts[0].get(column) is not None:  # limits add up as times do
                total[column] = sum(p[column] * p["seconds"] for p in parts) / total["seconds"]
        if "exact" in parts[0]:
            total["exact"] = all(part["exact"] for part in parts)
            total["differing"] = sum(part["differing"] for part in parts)
            total["checked"] = sum(part["checked"] for part in parts)
        if "measured_share" in parts[0]:
            total["measured_share"] = min(part["measured_share"] for part in parts)
        sums.append(total)
    return sums


def _on_disk(
    files: dict[str, Path], given: argparse.Namespace, rows: int | None, queries: int, label: str
) -> list[report.Record]:
    """`build_banks` and a search, with and without a memory limit."""
    records = []
    known = {}
    for layer, file in files.items():
        with safe_open(file, "pt") as stored:
            known[layer] = stored.get_tensor("bim_votes")
    for memory_gib in (0.7 if given.quick else 1.0, None):
        with tempfile.TemporaryDirectory() as folder:
            votes = Path(folder) / "votes.safetensors"
            times = in_child(
                "benchmarks.search",
                "search_banks",
                given.threads,
                experiment=[given.config, given.root, given.backbone],
                features={layer: str(file.absolute()) for layer, file in files.items()},
                rows=rows,
                memory_gib=memory_gib,
                votes=str(votes),
            )
            found = load_file(votes)
        differing = sum(int((found[layer] != known[layer]).any(1).sum()) for layer in files)
        kind = f"within {memory_gib} GiB" if memory_gib else "in memory"
        checked = {"exact": not differing, "differing": differing, "checked": queries * len(files)}
        for case, extra in (("build", {}), ("search", checked)):
            name = f"{label}: all banks {kind}, {'built' if case == 'build' else f'{queries} bim queries'}"
            records.append({"case": name, "method": report.OURS, **times[case], **extra})
    return records


def search_banks(
    experiment: Sequence[Any],
    features: dict[str, str],
    rows: int | None,
    memory_gib: float | None,
    votes: str,
) -> dict[str, Any]:
    """Build and search all banks in this process; the times of both."""
    run = backbone_run(report.experiment(*experiment))
    network = FeatureNetwork(run.networks.backbone().network, list(features)).eval()
    batches = bank_batches(run, rows)

    def build() -> dict[str, MemoryBank]:
        return build_banks(network, batches, run.data.num_classes, BankSettings(memory_gib=memory_gib))

    def search() -> dict[str, torch.Tensor]:
        found = {}
        for layer, file in features.items():
            with safe_open(file, "pt") as stored:
                found[layer] = banks[layer].votes(stored.get_tensor("bim"), run.experiment.victim.k)
        return found

    banks, built = timed(build)
    found, searched = timed(search)  # the first search encodes the banks
    save_file(found, votes)
    return {"build": built, "search": searched}


if __name__ == "__main__":
    main()
