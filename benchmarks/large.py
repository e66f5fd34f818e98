"""Banks larger than memory: python -m benchmarks.large [--quick] [--folder DIR].

The banks are synthetic, of several sizes, with overlapping clusters: images of 64 pixels, drawn around the
centre of their class, pass a network of one layer with 512 rectified features. `build_banks` writes them to
disk within the smallest possible `memory_gib`. Then come votes on 100 new images of the same classes.
Methods: exact search from disk, and the approximate backends, whose index is in memory.

An exact search is ``exact`` if rows, order and votes equal those of a float64 brute force on recomputed
features. ``recall`` is the share of the true k nearest that an approximate search finds; ``differing`` counts
queries with other votes. ``linear`` is the CPU time of exact search for each row, relative to the smallest
bank; CPU time depends less on other load than wall time. Each method and size runs in its own process.
``grown_mib`` is its peak memory without Python, torch and this module, before the brute force; compare it
with ``memory_mib``, its limit. Finished measurements are kept in ``runs/benchmarks/large`` and not repeated.
"""

import argparse
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.measure import in_child, peak_mib, timed
from lightning_advknn import __version__
from lightning_advknn.choices import Backend
from lightning_advknn.data import Batch
from lightning_advknn.functional import count_votes
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import APPROXIMATE, MemoryBank, check_backend, least_bytes
from lightning_advknn.search.build import BankSettings, build_banks
from lightning_advknn.storage import digest, load_tensors, read_json, save_tensors, write_json

T = TypeVar("T")

_PIXELS, _BATCH, _K, _QUERIES = 64, 4096, 75, 100
_METHODS: dict[str, Backend] = {report.OURS: "auto", "ivf": "ivf", "hnsw": "hnsw"}
_FURTHER = ("rows", "recall", "differing", "checked", "cpu_seconds", "linear", "memory_mib", "grown_mib")


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--folder", help="Folder for banks of up to 3 GiB; the system's temporary folder.")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS), help="Only these.")
    given = report.parse(parser, args)
    sizes, width, classes = ([250_000, 500_000, 1_000_000], 512, 1000)
    if given.quick:
        sizes, width, classes = [2000, 4000, 8000], 64, 20
    records = [
        record
        for rows in sizes
        for method in _METHODS
        if method in given.methods
        for record in _measured(method, rows, width, classes, given)
    ]
    settings = {"width": width, "classes": classes, "k": _K, "metric": "cosine", "queries": _QUERIES}
    records = report.with_ratios(_with_linear(records))
    report.publish("large", records, given, settings, *_FURTHER)
    return records


def _measured(
    method: str, rows: int, width: int, classes: int, given: argparse.Namespace
) -> list[report.Record]:
    """Measure one method on a bank of one size, unless an earlier run has."""
    sizes = {"rows": rows, "width": width, "classes": classes}
    key = digest([sizes, given.threads, report.device(), __version__])
    folder = Path("runs/benchmarks/large")
    kept = folder / f"{key}-{_METHODS[method]}.json"
    if not kept.is_file():
        truth = str((folder / f"{key}.safetensors").absolute())
        backend = _METHODS[method]
        with tempfile.TemporaryDirectory(dir=given.folder) as place:
            arguments = {**sizes, "backend": backend, "folder": place, "truth": truth}
            write_json(kept, in_child("benchmarks.large", "measure", given.threads, **arguments))
    times = read_json(kept)
    label = f"{'quick, ' if given.quick else ''}{rows} x {width} on disk: "
    return [{"case": label + case, "method": method, "rows": rows, **each} for case, each in times.items()]


def _with_linear(records: Sequence[report.Record]) -> list[report.Record]:
    """Add ``linear`` to the records of exact search."""
    smallest: dict[str, float] = {}
    for record in records:
        if record["method"] == report.OURS:
            each = record["cpu_seconds"] / record["rows"]
            record["linear"] = each / smallest.setdefault(record["case"].split(": ")[1], each)
    return list(records)


def measure(rows: int, width: int, classes: int, backend: Backend, folder: str, truth: str) -> dict[str, Any]:
    """Build a bank on disk and search it, in this process.

    Args:
        rows: M.
        width: D.
        classes: C.
        backend: Backend that scans the bank.
        folder: Folder for the bank.
        truth: File of the nearest rows by brute force, made if it is missing.

    Returns:
        Times by case: ``extracted``, ``made ready`` (for the first search), and the queries.
    """
    check_backend(backend)  # imports faiss
    started = peak_mib()
    network, clusters = _network(width), Clusters(rows, classes)
    gib = least_bytes(rows, {"relu": width}, backend) / 2**30

    def build() -> MemoryBank:
        settings = BankSettings(backend=backend, memory_gib=gib, folder=Path(folder))
        return build_banks(network, clusters, classes, settings)["relu"]

    queries = network.features(clusters.draw(_QUERIES, seed=rows)[0])["relu"]
    found: dict[str, Any] = {}
    repeats = 1 if backend in APPROXIMATE else 3  # building an index is slow
    bank, found["extracted"] = _timed(build, repeats)

    def make_ready() -> None:
        bank._scan = None
        bank.votes(queries[:1], _K)  # encodes or sorts the rows

    _, found["made ready"] = _timed(make_ready, repeats)
    votes, found[f"{_QUERIES} queries"] = _timed(lambda: bank.votes(queries, _K), 3)
    nearest = bank.search(queries, _K)[1]
    for each in found.values():
        each |= {"grown_mib": each["peak_mib"] - started, "memory_mib": 1024 * gib}
    if not Path(truth).is_file():
        save_tensors(Path(truth), {"nearest": brute_force(network, clusters, queries, _K)}, {})
    true = load_tensors(Path(truth))[0]["nearest"]
    wrong = (votes != count_votes(bank.labels[true], classes)).any(1)
    judged = found[f"{_QUERIES} queries"]
    if backend in APPROXIMATE:
        shares = [torch.isin(t, f).double().mean() for t, f in zip(true, nearest, strict=True)]
        judged["recall"] = float(torch.stack(shares).mean())
    else:
        wrong |= (nearest != true).any(1)
        judged["exact"] = not wrong.any().item()
    judged |= {"differing": int(wrong.sum()), "checked": _QUERIES}
    return found


def _timed(function: Callable[[], T], repeats: int) -> tuple[T, dict[str, float]]:
    """As `timed`, with ``cpu_seconds`` of all threads for one call."""
    started = time.process_time()
    result, found = timed(function, repeats)
    return result, {**found, "cpu_seconds": (time.process_time() - started) / found["repeats"]}


@torch.no_grad()
def brute_force(network: FeatureNetwork, clusters: "Clusters", queries: Tensor, k: int) -> Tensor:
    """The k nearest rows int64 ``(B, k)`` in float64, ordered by cosine to 12 decimals, then by row."""
    left = _unit(queries)
    best, nearest = np.empty((len(left), 0)), np.empty((len(left), 0), dtype=np.int64)
    for batch in clusters:
        similarities = left @ _unit(network.features(batch.images)["relu"]).T
        rows = np.broadcast_to(batch.ids.numpy(), similarities.shape)
        best = np.concatenate([best, similarities.round(12)], axis=1)
        nearest = np.concatenate([nearest, rows], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, nearest = np.take_along_axis(best, order, 1), np.take_along_axis(nearest, order, 1)
    return torch.from_numpy(nearest)


def _unit(features: Tensor) -> Any:
    rows = features.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-300)


class Clusters:
    """Batches of images ``(n, 1, 1, 64)`` in [0, 1] around the centres of their classes, generated when read.

    Args:
        rows: Number of images.
        classes: C.
    """

    def __init__(self, rows: int, classes: int) -> None:
        self.dataset, self.batch_size = range(rows), _BATCH
        # Most of the variance lies in few directions, as in a network's features.
        self.scale = 0.25 / torch.arange(1, _PIXELS + 1).sqrt()
        self.centres = torch.randn(classes, _PIXELS, generator=torch.Generator().manual_seed(0))

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw n images and their classes."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self.centres), (n,), generator=generator)
        noise = torch.randn(n, _PIXELS, generator=generator)
        images = 0.5 + self.scale * (0.6 * self.centres[labels] + 0.4 * noise)
        return images.clamp(0, 1)[:, None, None], labels

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order of id."""
        for start in self.dataset[::_BATCH]:
            n = min(_BATCH, len(self.dataset) - start)
            images, labels = self.draw(n, seed=start + 1)
            yield Batch(images, labels, torch.arange(start, start + n))


def _network(width: int) -> FeatureNetwork:
    torch.manual_seed(0)
    linear = nn.Linear(_PIXELS, width)
    # Centred, so that about half of the features are zero, as usual after a ReLU.
    linear.bias.data = -0.5 * linear.weight.detach().sum(1)
    layers = OrderedDict(flatten=nn.Flatten(), linear=linear, relu=nn.ReLU(), logits=nn.Linear(width, 2))
    return FeatureNetwork(nn.Sequential(layers), ["relu"]).eval()


if __name__ == "__main__":
    main()
