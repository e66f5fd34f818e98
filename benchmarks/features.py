"""Real features to search, with the right votes, cached under a key of all that they depend on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.layer_files import BANK, KNOWN, load_bank
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import perturb
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.functional import count_votes
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.storage import atomic_path, digest, weights_digest

_QUERIES, _ROWS = 500, 2048  # of a float64 product


def backbone_run(experiment: Experiment) -> ExperimentRun:
    """A run of the experiment's backbone whose attacks ascend true labels, which need no search."""
    return ExperimentRun(replace(experiment, label_source="true"))


def prepare(
    run: ExperimentRun,
    folder: Path,
    rows: int | None,
    queries: int,
    checked: int,
    layers: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Make the folder of each layer's features, unless it exists. The banks are written batch by batch.

    Args:
        run: From `backbone_run`.
        folder: Where the folders go.
        rows: Number of training images in the bank; None for all.
        queries: Number of test images, clean and attacked by the experiment's ``bim`` through the backbone.
        checked: Number of the bank's rows with known leave-one-out votes.
        layers: Only these; None for all.

    Returns:
        By layer, a folder with the bank, float32 ``(M, D)`` (`layer_files.load_bank`), and what is known of
        it (`layer_files.load_known`): ``labels``; features ``clean`` and ``bim``, float32; and votes of a
        float64 brute force: ``clean_votes``, ``bim_votes``, and leave-one-out ``checked_votes`` of the rows
        ``checked``.
    """
    network, k = run.networks.backbone(), run.experiment.victim.k
    attack = run.experiment.attacks["bim"]
    key = digest([weights_digest(network), run.data.fingerprint, str(attack), rows, queries, k, checked])
    folders = {layer: folder / key / layer for layer in layers or network.layers}
    missing = {layer: path for layer, path in folders.items() if not (path / KNOWN).is_file()}
    if missing:
        asked = _asked(run, folder / key / "images.safetensors", queries)
        for layer, path in missing.items():
            made = _layer(run, FeatureNetwork(network.network, [layer]).eval(), path, rows, asked, checked, k)
            with atomic_path(path / KNOWN) as temporary:  # last, so that a folder with it is complete
                save_file(made, temporary)
    return folders


def _asked(run: ExperimentRun, path: Path, queries: int) -> dict[str, Tensor]:
    """Test images, ``clean`` and attacked by ``bim``, kept in a file for layers that are made later."""
    if not path.is_file():
        images, labels, _ids = run.test.__getitems__(range(min(queries, len(run.test))))
        attacked = perturb(run.experiment.attacks["bim"].bind(), run.networks.backbone(), images, labels)
        with atomic_path(path) as temporary:
            save_file({"clean": images, "bim": attacked}, temporary)
    return load_file(path)


def _layer(
    run: ExperimentRun,
    network: FeatureNetwork,
    folder: Path,
    rows: int | None,
    queries: dict[str, Tensor],
    checked: int,
    k: int,
) -> dict[str, Tensor]:
    labels = _write_bank(network, bank_batches(run, rows), folder)
    bank = load_bank(folder, mapped=True)
    found = {"labels": labels}
    for name, some in queries.items():
        (features,) = _features(network, some).values()
        found |= {name: features, f"{name}_votes": exact_votes(bank, labels, features, k)}
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(bank), generator=generator)[:checked].sort().values
    return {
        **found,
        "checked": chosen,
        "checked_votes": exact_votes(bank, labels, bank[chosen], k, own=chosen),
    }


def bank_batches(run: ExperimentRun, rows: int | None) -> list[Batch]:
    """The first training images."""
    split = run.data.split("train")
    positions = torch.arange(len(split) if rows is None else min(rows, len(split)))
    return [split.__getitems__(part.tolist()) for part in torch.split(positions, run.data.eval_batch_size)]


def _write_bank(network: FeatureNetwork, batches: list[Batch], folder: Path) -> Tensor:
    """Write one layer's features of all batches; their labels."""
    width = _features(network, batches[0].images[:1])[network.layers[0]].shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    total, start = sum(len(batch.images) for batch in batches), 0
    file = np.lib.format.open_memmap(folder / BANK, mode="w+", dtype=np.float32, shape=(total, width))
    for batch in batches:
        (some,) = _features(network, batch.images).values()
        file[start : start + len(some)] = some.numpy()
        start += len(some)
    file.flush()
    return torch.cat([batch.labels for batch in batches])


@torch.no_grad()
def _features(network: FeatureNetwork, images: Tensor) -> dict[str, Tensor]:
    return network.features(images)


def exact_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """Votes int64 ``(B, C)`` by brute force in float64, ordered by cosine to 12 decimals, then by bank row.

    Args:
        bank: float32 ``(M, D)``.
        labels: int64 ``(M,)``.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.
        own: Row to leave out for each query, int64 ``(B,)``.
    """
    lengths = torch.cat([part.double().norm(dim=1) for part in torch.split(bank, _ROWS)])
    found = []
    for start in range(0, len(queries), _QUERIES):
        some = slice(start, start + _QUERIES)
        left = queries[some].double()
        similarities = torch.empty(len(left), len(bank), dtype=torch.float64)
        for first in range(0, len(bank), _ROWS):
            rows = slice(first, first + _ROWS)
            sizes = left.norm(dim=1, keepdim=True) * lengths[rows]
            similarities[:, rows] = torch.where(sizes > 0, left @ bank[rows].double().T / sizes, 0.0)
        similarities = similarities.round_(decimals=12)
        if own is not None:
            similarities[torch.arange(len(left)), own[some]] = -torch.inf
        parts = torch.split(similarities, 100)
        found += [part.sort(dim=1, descending=True, stable=True).indices[:, :k] for part in parts]
    return count_votes(labels[torch.cat(found)], int(labels.max()) + 1)
