"""Real features to search, with the right votes, cached under a key of all that they depend on."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_advknn.data import Batch
from lightning_advknn.evaluation import perturb
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.functional import count_votes
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.storage import atomic_path, digest, weights_digest

_QUERIES, _ROWS = 1000, 4096  # of a float64 product


def backbone_run(experiment: Experiment) -> ExperimentRun:
    """A run of the experiment's backbone whose attacks ascend true labels, which need no search."""
    return ExperimentRun(replace(experiment, label_source="true"))


def prepare(
    run: ExperimentRun, folder: Path, rows: int | None, queries: int, checked: int
) -> dict[str, Path]:
    """Make the files of each layer's features, unless they exist.

    Args:
        run: From `backbone_run`.
        folder: Folder for the files.
        rows: Number of training images in the bank; None for all.
        queries: Number of test images, clean and attacked by the experiment's ``bim`` through the backbone.
        checked: Number of the bank's rows with known leave-one-out votes.

    Returns:
        By layer, a file with features ``bank``, ``clean`` and ``bim``, float32; ``labels``; and votes of a
        float64 brute force: ``clean_votes``, ``bim_votes``, and leave-one-out ``checked_votes`` of the rows
        ``checked``.
    """
    network, k = run.networks.backbone(), run.experiment.victim.k
    key = digest(
        [
            weights_digest(network),
            run.data.fingerprint,
            str(run.experiment.attacks["bim"]),
            rows,
            queries,
            k,
            checked,
        ]
    )
    files = {layer: folder / key / f"{layer}.safetensors" for layer in network.layers}
    missing = {layer: path for layer, path in files.items() if not path.is_file()}
    if missing:
        images, labels, _ids = run.test.__getitems__(range(min(queries, len(run.test))))
        bim = perturb(run.experiment.attacks["bim"].bind(), network, images, labels)
        asked = {"clean": images, "bim": bim}
        for layer, path in missing.items():
            made = _layer(run, FeatureNetwork(network.network, [layer]).eval(), rows, asked, checked, k)
            with atomic_path(path) as temporary:
                save_file(made, temporary)
    return files


def _layer(
    run: ExperimentRun,
    network: FeatureNetwork,
    rows: int | None,
    queries: dict[str, Tensor],
    checked: int,
    k: int,
) -> dict[str, Tensor]:
    bank, labels = _features(network, bank_batches(run, rows))
    found = {"bank": bank, "labels": labels}
    for name, some in queries.items():
        features, _ = _features(network, [Batch(some, labels[:0], labels[:0])])
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


@torch.no_grad()
def _features(network: FeatureNetwork, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One layer's features ``(n, D)`` and the labels."""
    total, start, features = sum(len(batch.images) for batch in batches), 0, torch.empty(0)
    for batch in batches:
        (some,) = network.features(batch.images).values()
        if not start:
            features = torch.empty(total, some.shape[1])
        features[start : start + len(some)] = some
        start += len(some)
    return features, torch.cat([batch.labels for batch in batches])


def exact_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """Votes int64 ``(B, C)`` by brute force in float64, ordered by cosine to 12 decimals, then by bank row.

    Args:
        bank: float32 ``(M, D)``.
        labels: int64 ``(M,)``.
        queries: float32 ``(B, D)``.
        k: Number of neighbours.
        own: Row to leave out for each query, int64 ``(B,)``.
    """
    similarities = torch.empty(len(queries), len(bank), dtype=torch.float64)
    lengths = torch.cat([part.double().norm(dim=1) for part in torch.split(bank, _ROWS)])
    left = queries.double()
    for start in range(0, len(bank), _ROWS):
        rows = slice(start, start + _ROWS)
        sizes = left.norm(dim=1, keepdim=True) * lengths[rows]
        similarities[:, rows] = torch.where(sizes > 0, left @ bank[rows].double().T / sizes, 0.0)
    similarities = similarities.round(decimals=12)
    if own is not None:
        similarities[torch.arange(len(queries)), own] = -torch.inf
    nearest = [
        part.sort(dim=1, descending=True, stable=True).indices[:, :k]
        for part in torch.split(similarities, 100)
    ]
    return count_votes(labels[torch.cat(nearest)], int(labels.max()) + 1)
