"""Exact k nearest neighbours by cosine in real features: python -m benchmarks.search [--quick] [--root DIR].

Cases, for each layer of a trained backbone and for all together: preparing the bank, votes on clean and on
adversarial test images, and leave-one-out votes on the bank's rows. Methods: `MemoryBank` by default and in
float32; brute force in float32 by faiss, scikit-learn and plain torch; and the bare matrix product of the
same shape, which is the hardware's limit. A leave-one-out product serves both rows of a pair, so its share of
the limit can exceed 1.

A method is ``exact`` if its votes equal those of a float64 brute force on every query; ``differing`` counts
queries with other votes. Leave-one-out votes are compared on some rows (``checked``). Each method and layer
runs in its own process, whose peak memory includes Python, torch and the features. ``blas`` is what
multiplies its matrices.

Rounds go over all methods, so that what else the machine does hits all alike; ``min`` and ``max`` are over
rounds. Each measurement is kept in ``runs/benchmarks/search`` at once, and the results are written anew. A
run that was stopped goes on where it was, as long as neither the code of search nor the features change, and
one with other ``--layers``, ``--methods`` or ``--cases`` adds to them. ``--prepare`` only makes the features.

Two cases are measured only if ``--cases`` names them: ``disk`` and ``memory`` build all banks by
`build_banks` within 1 GiB, partly on disk, and without a limit, and search them.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, scans
from benchmarks.blas import fastest_for
from benchmarks.features import backbone_run, bank_batches, prepare
from benchmarks.kept import Kept, source_digest
from benchmarks.layer_files import load_known
from benchmarks.measure import in_child, summarized, timed
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.build import BankSettings, build_banks
from lightning_advknn.storage import digest, versions

ALL_LAYERS = "all layers"
_LIMITS = {"limit_share": "bare product", "float32_limit_share": "bare float32 product"}
_FURTHER = (*_LIMITS, "precision", "differing", "checked", "measured_share", "blas")
_WITHIN = {"disk": 1.0, "memory": None}  # GiB
_SOURCES = ("lightning_advknn/search/**/*.py", "lightning_advknn/functional/*.py", "benchmarks/scans.py")


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--prepare", action="store_true", help="Make the features, and measure nothing.")
    parser.add_argument("--layers", nargs="+", help="Only these layers.")
    parser.add_argument(
        "--methods", nargs="+", choices=scans.METHODS, default=scans.METHODS, help="Only these."
    )
    parser.add_argument(
        "--cases", nargs="+", choices=(*scans.CASES, *_WITHIN), default=scans.CASES, help="Only these."
    )
    parser.add_argument("--repeats", type=int, default=3, help="Rounds; leave-one-out is in the first alone.")
    parser.add_argument(
        "--rows",
        type=int,
        default=1000,
        help="Leave-one-out queries of other libraries, whose time is extrapolated to all; 0 for all.",
    )
    given = report.parse(parser, args)
    experiment = report.experiment(given.config, given.root, given.backbone)
    rows, queries, checked = (10_000, 200, 100) if given.quick else (None, 1000, 1000)
    run = backbone_run(experiment)
    network = run.networks.backbone()
    folders = prepare(run, Path("runs/benchmarks/features"), rows, queries, checked, given.layers)
    if given.prepare:
        return []
    size, queries = sum(len(batch.labels) for batch in bank_batches(run, rows)), min(queries, len(run.test))
    features = next(iter(folders.values())).parent.name
    key = digest([features, source_digest(*_SOURCES), given.threads, given.rows, report.device(), versions()])
    kept = Kept(Path("runs/benchmarks/search") / f"{key}.jsonl")
    settings = {"experiment": run.describe(), "rows": size, "queries": queries}
    label = f"{'quick, ' if given.quick else ''}{run.data.name}, {size} rows"
    records: list[report.Record] = []
    for _ in _measured(kept, folders, given, experiment.victim.k, rows):
        records = _records(kept, list(network.layers), queries, label)
        report.write("search", records, given, settings, *_FURTHER)
    records = _records(kept, list(network.layers), queries, label)
    report.publish("search", records, given, settings, *_FURTHER)
    return records


def _measured(
    kept: Kept, folders: Mapping[str, Path], given: argparse.Namespace, k: int, rows: int | None
) -> Iterator[None]:
    """Measure what is missing; stop after each process."""
    for turn in range(given.repeats):
        wanted = [case for case in given.cases if case in scans.CASES and (case in scans.QUERIES or not turn)]
        for layer, folder in folders.items():
            for method in given.methods:
                there = {line["case"] for line in kept.having(layer=layer, method=method, turn=turn)}
                if missing := [case for case in wanted if case not in there]:
                    _measure(kept, layer, folder, method, missing, turn, given, k)
                    yield
    for kind in (case for case in given.cases if case in _WITHIN):
        if not kept.having(layer=ALL_LAYERS, built=kind):
            _measure_built(kept, kind, folders, given, rows)
            yield


def _measure(
    kept: Kept,
    layer: str,
    folder: Path,
    method: str,
    cases: Sequence[str],
    turn: int,
    given: argparse.Namespace,
    k: int,
) -> None:
    """One method on one layer, in its own process."""
    found = in_child(
        "benchmarks.scans",
        "measure",
        given.threads,
        fastest_for(method, given.threads),
        method=method,
        folder=str(folder.absolute()),
        cases=cases,
        k=k,
        rows=given.rows,
    )
    same = {"layer": layer, "method": method, "turn": turn, "blas": found.pop("blas")}
    precision = found.pop("precision")
    if method.startswith("bare"):
        same["precision"] = precision if method == "bare product" else "float32"
        del found["bank"]
    for case in cases:  # also those that a library does not have, so that they are not tried again
        kept.add(**same, case=case, **found.get(case, {}))
    if "bank" in found and not kept.having(layer=layer, method=method, turn=turn, case="bank"):
        kept.add(**same, case="bank", seconds=found["bank"]["seconds"], peak_mib=found["bank"]["peak_mib"])


def _records(kept: Kept, layers: Sequence[str], queries: int, label: str) -> list[report.Record]:
    """What has been measured, over rounds, by layer and over all layers."""
    cases = {
        "bank": "make ready",
        **{kind: f"{queries} {kind} queries" for kind in scans.QUERIES},
        scans.LEAVE_ONE_OUT: scans.LEAVE_ONE_OUT,
    }
    records: list[report.Record] = []
    for layer in (*layers, ALL_LAYERS):
        for case, name in cases.items():
            found = {}
            for method in scans.METHODS:
                lines = kept.having(method=method, case=case)
                rounds = sorted({line["turn"] for line in lines})
                turns = [turn for each in rounds if (turn := _turn(lines, each, layer, layers))]
                if turns:
                    found[method] = {"case": f"{label}: {layer}, {name}", "method": method, **_over(turns)}
            for record in found.values():
                for column, limit in _LIMITS.items():
                    if limit in found and case != "bank":
                        record[column] = found[limit]["seconds"] / record["seconds"]
            records += found.values()
    for kind, gib in _WITHIN.items():
        for line in kept.having(layer=ALL_LAYERS, built=kind):
            within = f"within {gib} GiB" if gib else "in memory"
            done = "built" if line["case"] == "build" else f"{queries} bim queries"
            record = {"case": f"{label}: all banks {within}, {done}", "method": report.OURS}
            records.append({**record, **_over([[line]])})
    return report.with_ratios(records)


def _turn(
    lines: Sequence[Mapping[str, Any]], turn: int, layer: str, layers: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Measurements of one round on a layer, or on each of all layers; none if one is missing."""
    wanted = layers if layer == ALL_LAYERS else [layer]
    found = [line for line in lines if line["turn"] == turn and line["layer"] in wanted and "seconds" in line]
    return found if len(found) == len(wanted) else []


def _over(turns: Sequence[Sequence[Mapping[str, Any]]]) -> report.Record:
    """Times over rounds, each of which is the sum of its lines; the largest peak; the differing votes."""
    lines = [line for turn in turns for line in turn]
    record: report.Record = summarized([sum(line["seconds"] for line in turn) for turn in turns])
    record["peak_mib"] = max(line["peak_mib"] for line in lines)
    if "differing" in lines[0]:
        record["differing"] = max(sum(line["differing"] for line in turn) for turn in turns)
        record["exact"] = not record["differing"]
        record["checked"] = sum(line["checked"] for line in turns[0])
    shares = [line["measured_share"] for line in lines if "measured_share" in line]
    record["measured_share"] = min(shares) if shares else None
    for column in ("precision", "blas"):
        values = {line[column] for line in lines if line.get(column)}
        record[column] = values.pop() if len(values) == 1 else None
    return record


def _measure_built(
    kept: Kept, kind: str, folders: Mapping[str, Path], given: argparse.Namespace, rows: int | None
) -> None:
    """`build_banks` and a search, within a memory limit or not."""
    gib = 0.7 if given.quick and _WITHIN[kind] else _WITHIN[kind]
    found = in_child(
        "benchmarks.search",
        "search_banks",
        given.threads,
        experiment=[given.config, given.root, given.backbone],
        folders={layer: str(folder.absolute()) for layer, folder in folders.items()},
        rows=rows,
        memory_gib=gib,
    )
    for case, values in found.items():
        kept.add(layer=ALL_LAYERS, built=kind, method=report.OURS, case=case, **values)


def search_banks(
    experiment: Sequence[Any], folders: dict[str, str], rows: int | None, memory_gib: float | None
) -> dict[str, Any]:
    """Build and search all banks in this process; times of both, and the differing votes of the search."""
    run = backbone_run(report.experiment(*experiment))
    network = FeatureNetwork(run.networks.backbone().network, list(folders)).eval()
    batches = bank_batches(run, rows)
    known = {layer: load_known(Path(folder)) for layer, folder in folders.items()}

    def build() -> dict[str, MemoryBank]:
        return build_banks(network, batches, run.data.num_classes, BankSettings(memory_gib=memory_gib))

    def search() -> dict[str, torch.Tensor]:
        return {layer: banks[layer].votes(known[layer]["bim"], run.experiment.victim.k) for layer in folders}

    banks, built = timed(build)
    found, searched = timed(search)  # the first search encodes the banks
    wrong = [(found[layer] != known[layer]["bim_votes"]).any(1) for layer in folders]
    judged = {"differing": int(torch.cat(wrong).sum()), "checked": sum(map(len, wrong))}
    times = {
        case: {name: time[name] for name in ("seconds", "peak_mib")}
        for case, time in (("build", built), ("search", searched))
    }
    return {"build": times["build"], "search": {**times["search"], **judged}}


if __name__ == "__main__":
    main()
