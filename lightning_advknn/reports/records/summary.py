"""What a summary says of rows, as JSON can hold it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.evaluation import Rows, summarize
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN

Distribution = list[tuple[float, int]]
"""Values in ascending order, each with how often it occurs."""


def metrics_of(rows: Rows) -> dict[str, float | None]:
    """`evaluation.summarize`; None for NaN, which JSON does not have and means over no successes are."""
    return {name: None if math.isnan(value) else value for name, value in summarize(rows).items()}


def credibility_of(rows: Rows) -> dict[str, dict[str, Distribution]]:
    """How DkNN's credibility after the attack is distributed (Fig. 5), exactly.

    Returns:
        Under ``dknn``: ``all`` over all images, ``success`` over those that DkNN gets wrong; values to 6 decimals.
    """
    values = rows["dknn_credibility_after"]
    wrong = rows["dknn_after"] != rows["label"]
    return {"dknn": {"all": _distribution(values), "success": _distribution(values[wrong])}}


def approximations_of(run: ExperimentRun) -> dict[str, Any]:
    """What a summary says of approximate neighbours: ``approximation`` by network; nothing of exact ones."""
    networks = {ORIGIN: run.attacked, **run.transfers}
    found = {name: victims.approximation for name, victims in networks.items() if victims.approximation}
    return {"approximation": found} if found else {}


def which_images(settings: Mapping[str, Any], n: int) -> str:
    """Which test images an experiment is on.

    Args:
        settings: As `ExperimentRun.describe`; earlier versions took the first images and named no sample.
        n: How many.

    >>> which_images({"images": 200, "sample": {"of": 9250, "seed": 0}}, 200)
    '200 of 9,250 test images, classes as in the whole, seed 0'
    >>> which_images({"images": 200}, 200), which_images({}, 9250)
    ('the first 200 test images', '9250 test images')
    """
    if "images" not in settings:
        return f"{n} test images"
    if "sample" not in settings:
        return f"the first {n} test images"
    sample = settings["sample"]
    return f"{n} of {sample['of']:,} test images, classes as in the whole, seed {sample['seed']}"


def notes_of(victims: Judges) -> str:
    """What every number on these victims has to say of itself: whose images, how many of the true neighbours; "" if nothing."""
    data = victims.data
    files = f"{data.name}: {data.note}." if data.note else ""
    return " ".join(filter(None, (files, neighbours_sentence(victims.approximation))))


def neighbours_sentence(approximation: Mapping[str, Any] | None) -> str:
    """How approximate neighbours were found and how many of the true ones, from `Victims.approximation`; "" of exact ones.

    >>> neighbours_sentence({"backend": "ivf", "nlist": 9, "nprobe": 2, "k": 75, "images": 100, "recall": {"relu3": 0.98}})
    'Approximate neighbours (ivf, nlist 9, nprobe 2): recall@75 on 100 validation images is relu3 0.9800.'
    """
    if not approximation:
        return ""
    known = ("backend", "k", "images", "recall")
    settings = [f"{name} {value}" for name, value in approximation.items() if name not in known]
    shares = ", ".join(f"{layer} {share:.4f}" for layer, share in approximation["recall"].items())
    return (
        f"Approximate neighbours ({', '.join([approximation['backend'], *settings])}): recall@{approximation['k']} on"
        f" {approximation['images']} validation images is {shares}."
    )


def _distribution(values: Tensor) -> Distribution:
    found, counts = torch.unique(values.round(decimals=6), return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))
