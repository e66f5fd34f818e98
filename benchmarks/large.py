"""Banks beyond memory: python -m benchmarks.large [--quick] [--folder DIR].

Synthetic banks of several sizes, whose rows lie in overlapping clusters: images of 64 pixels, drawn around the centre of their class,
go through a network of one layer into 512 rectified features. `build_banks` streams them to disk within `memory_gib`;
then votes on new images of the same classes. Methods: exact search from disk, and the approximate backends.

An exact search is ``exact`` if rows, order and votes are those of a float64 brute force over the whole file. ``recall`` is
the share of the true k nearest that an approximate one finds. ``linear`` is time over rows, relative to the smallest bank. Each
runs in a process of its own: ``grown_mib`` is its peak memory less what Python, torch and this module took before, to be
compared with ``memory_mib``, which it was given; the brute force comes after.
"""

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import report
from benchmarks.measure import in_child, peak_mib, timed
from lightning_advknn.classifiers import build_banks
from lightning_advknn.data import Batch
from lightning_advknn.functional import count_votes
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import Backend, MemoryBank

_PIXELS, _BATCH, _K = 64, 4096, 75
_FURTHER = ("rows", "recall", "differing", "checked", "linear", "memory_mib", "grown_mib")
_METHODS: dict[str, Backend] = {report.OURS: "auto", "ivf": "ivf", "hnsw": "hnsw"}
_MEMORY = {"auto": 0.75, "ivf": 2.25, "hnsw": 1.5}  # GiB


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--folder", help="Where the banks go, 4 GiB at most; the system's temporary folder.")
    given = report.parse(parser, args)
    sizes, width, classes = ([100_000, 250_000, 500_000, 1_000_000], 512, 1000)
    if given.quick:
        sizes, width, classes = [2000, 4000, 8000], 64, 20
    # A graph of a million rows takes too long to make.
    wanted = {"ivf": (sizes[0], sizes[-1]), "hnsw": (sizes[0],)}
    records = []
    for rows in sizes:
        methods = [name for name in _METHODS if rows in wanted.get(name, sizes)]
        records += _compare(rows, width, classes, methods, given)
    settings = {"width": width, "classes": classes, "k": _K, "metric": "cosine", "memory_gib": _MEMORY}
    records = report.with_ratios(_with_linear(records))
    report.publish("large", records, given, settings, *_FURTHER)
    return records


def _compare(
    rows: int, width: int, classes: int, methods: Sequence[str], given: argparse.Namespace
) -> list[report.Record]:
    """All methods on a bank of one size."""
    records: list[report.Record] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for method in methods:
            times = in_child(
                "benchmarks.large",
                "measure",
                given.threads,
                rows=rows,
                width=width,
                classes=classes,
                backend=_METHODS[method],
                folder=folder,
            )
            common = {"method": method, "rows": rows, "memory_mib": 1024 * _MEMORY[_METHODS[method]]}
            label = f"{'quick, ' if given.quick else ''}{rows} x {width} on disk: "
            for case, time in times.items():
                records.append({"case": label + case, **common, **time})
    return records


def _with_linear(records: Sequence[report.Record]) -> list[report.Record]:
    """Records with their time over rows, relative to that of the smallest bank."""
    smallest: dict[Any, float] = {}
    done = []
    for record in records:
        kind = record["method"], record["case"].split(": ")[1]
        each = record["seconds"] / record["rows"]
        done.append({**record, "linear": each / smallest.setdefault(kind, each)})
    return done


def measure(rows: int, width: int, classes: int, backend: Backend, folder: str) -> dict[str, Any]:
    """Build a bank on disk and search it, in this process; a later call in the same folder finds its features there.

    Args:
        rows: M.
        width: D.
        classes: C.
        backend: What scans it; the exact one comes first, and leaves the truth in the folder.
        folder: Where.

    Returns:
        Times by case: ``extracted`` (with the exact backend), ``made ready``, ``100 queries``, ``2000 queries``.
    """
    started = peak_mib()
    network, clusters = _network(width), Clusters(rows, classes)

    def build() -> MemoryBank:
        gib = _MEMORY[backend]
        banks = build_banks(
            network, clusters, classes, backend=backend, memory_gib=gib, folder=Path(folder), key="bank"
        )
        return banks["relu"]

    images, _ = clusters.draw(2000, seed=rows)
    queries = network.features(images)["relu"]
    bank, extracted = timed(build)
    found: dict[str, Any] = {} if backend in ("ivf", "hnsw") else {"extracted": extracted}
    _, found["made ready"] = timed(lambda: bank.votes(queries[:1], _K))  # encodes or sorts the rows
    votes, found["100 queries"] = timed(lambda: bank.votes(queries[:100], _K), 3)
    nearest = bank.search(queries[:100], _K)[1]
    _, found["2000 queries"] = timed(lambda: bank.votes(queries, _K), 3)
    for time in found.values():
        time["grown_mib"] = time["peak_mib"] - started
    known = Path(folder) / "nearest.safetensors"
    if backend not in ("ivf", "hnsw"):
        true = brute_force(bank, queries[:100], _K)
        save_file({"nearest": true}, known)
        right = count_votes(bank.labels[true], classes)
        wrong = (nearest != true).any(1) | (votes != right).any(1)
        differing = int(wrong.sum())
        found["100 queries"] |= {"exact": not differing, "differing": differing, "checked": 100}
    else:
        true = load_file(known)["nearest"]
        shares = [torch.isin(t, f).double().mean() for t, f in zip(true, nearest, strict=True)]
        found["100 queries"] |= {"recall": float(torch.stack(shares).mean()), "checked": 100}
    return found


def brute_force(bank: MemoryBank, queries: Tensor, k: int) -> Tensor:
    """The k nearest rows by cosine in float64, int64 ``(B, k)``: nearest first to 12 decimals, then by row."""
    left = queries.double()
    left = left / left.norm(dim=1, keepdim=True).clamp(min=1e-300)
    best = torch.empty(len(queries), 0, dtype=torch.float64)
    nearest = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), 2**14):
        rows = bank.features[start : start + 2**14].double()
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
        best = torch.cat([best, (left @ rows.T).round(decimals=12)], dim=1)
        nearest = torch.cat([nearest, torch.arange(start, start + len(rows)).expand(len(left), -1)], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, nearest = best[:, :k], nearest.gather(1, order[:, :k])
    return nearest


class Clusters:
    """Batches of images ``(n, 1, 1, 64)`` in [0, 1], around the centres of their classes; made as they are read.

    Args:
        rows: How many.
        classes: C.
    """

    def __init__(self, rows: int, classes: int) -> None:
        self.dataset = range(rows)
        # Most of what classes and images differ in is in few directions, as in a network's features.
        self.spread = 0.25 / torch.arange(1, _PIXELS + 1).sqrt()
        self.centres = torch.randn(classes, _PIXELS, generator=torch.Generator().manual_seed(0))

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many images and their classes."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self.centres), (n,), generator=generator)
        noise = torch.randn(n, _PIXELS, generator=generator)
        images = 0.5 + self.spread * (0.6 * self.centres[labels] + 0.4 * noise)
        return images.clamp(0, 1)[:, None, None], labels

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order of id."""
        for start in self.dataset[::_BATCH]:
            n = min(_BATCH, len(self.dataset) - start)
            images, labels = self.draw(n, seed=start + 1)
            yield Batch(images, labels, torch.arange(start, start + n))


def _network(width: int) -> FeatureNetwork:
    torch.manual_seed(0)
    layers = OrderedDict(
        flatten=nn.Flatten(), linear=nn.Linear(_PIXELS, width), relu=nn.ReLU(), logits=nn.Linear(width, 2)
    )
    return FeatureNetwork(nn.Sequential(layers), ["relu"]).eval()


if __name__ == "__main__":
    main()
