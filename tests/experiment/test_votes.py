"""Votes that surrogates learn from, against NumPy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_advknn.data import Digits
from lightning_advknn.experiment.votes import ImitatedKNN
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.ranks import Ranks

K = 4


def imitated(data: Digits | None = None, backbone: str = "weights", **module: Any) -> ImitatedKNN:
    """Of a random layer on 150 digits."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 20))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(network[1].weight)
    settings = {"layer": "1", "k": K, "metric": "cosine", "backend": "float32", "index": None, **module}
    networks: Any = SimpleNamespace(
        backbone=lambda: FeatureNetwork(network, ["1"]),
        surrogate_module=lambda name: SimpleNamespace(**settings),
        key=lambda name: backbone,
        data=data or Digits(val_size=850, eval_batch_size=64),
        device=torch.device("cpu"),
    )
    return ImitatedKNN(networks, "dknnb", Ranks())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_votes_equal_a_brute_force_in_any_parts(metric: str) -> None:
    knn = imitated(metric=metric)
    knn.prepare()
    data = knn.networks.data
    rows, labels = {}, data.split("train").labels.numpy()
    for split in ("train", "val"):
        images = torch.cat([batch.images for batch in data.loader(split)])
        rows[split] = knn.network.features(images)["1"].double().detach().numpy()
    for split, queries in rows.items():
        if metric == "cosine":
            unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, rows["train"])]
            distances = 1 - unit[0] @ unit[1].T
        else:
            distances = np.linalg.norm(queries[:, None] - rows["train"], axis=2)
        if split == "train":
            np.fill_diagonal(distances, np.inf)
        nearest = labels[distances.argsort(1)[:, :K]]
        expected = [np.bincount(row, minlength=10).tolist() for row in nearest]
        n = len(queries)
        assert knn.votes(split, range(n)).tolist() == expected
        parts = [range(70), range(70, 71), range(71, n)]  # not those of the loader's batches
        assert torch.cat([knn.votes(split, part) for part in parts]).tolist() == expected


def test_the_key_names_all_that_votes_depend_on() -> None:
    changed = [
        imitated(k=K + 1),
        imitated(layer="0"),
        imitated(metric="euclidean"),
        imitated(backbone="others"),
        imitated(backend="ivf"),
        imitated(backend="ivf", index={"nlist": 2}),
    ]
    keys = {imitated().key, *(each.key for each in changed)}
    assert len(keys) == 1 + len(changed)
    assert imitated(backend="int8").key == imitated().key  # exact, as all that are no indices
