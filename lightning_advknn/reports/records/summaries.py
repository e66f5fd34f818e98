"""What the summary of a run says of its rows and images, as JSON can hold it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.evaluation import Rows, summarize

Histogram = list[tuple[float, int]]
"""Values in ascending order, each with how often it occurs."""


def metrics_of(rows: Rows) -> dict[str, float | None]:
    """`evaluation.summarize`; None for NaN, such as a mean over no successes."""
    return {name: None if math.isnan(value) else value for name, value in summarize(rows).items()}


def credibility_of(rows: Rows) -> dict[str, dict[str, Histogram]]:
    """The exact distribution of DkNN's credibility after the attack (Fig. 5).

    Returns:
        Under ``dknn``: ``all`` over all images, ``success`` over those that DkNN misclassifies. Values have 6
        decimals.
    """
    values = rows["dknn_credibility_after"]
    wrong = rows["dknn_after"] != rows["label"]
    return {"dknn": {"all": _distribution(values), "success": _distribution(values[wrong])}}


def which_images(settings: Mapping[str, Any], n: int) -> str:
    """Which test images an experiment attacks.

    Args:
        settings: As `ExperimentRun.describe`. Earlier versions took the first images and named no sample.
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


def note_of(data: str, data_note: str, approximation: Mapping[str, Any] | None) -> str:
    """What qualifies every number of an experiment; "" if nothing does.

    Args:
        data: Name of the data set.
        data_note: What its files are, if they are not the official ones.
        approximation: As in `neighbours_sentence`.
    """
    files = f"{data}: {data_note}." if data_note else ""
    return " ".join(filter(None, (files, neighbours_sentence(approximation))))


def neighbours_sentence(approximation: Mapping[str, Any] | None) -> str:
    """How approximate neighbours were found, and how many of the true ones; "" of exact neighbours.

    >>> found = {"backend": "ivf", "nlist": 9, "nprobe": 2, "k": 75, "images": 100, "recall": {"relu3": 0.98}}
    >>> neighbours_sentence(found)
    'Approximate neighbours (ivf, nlist 9, nprobe 2): recall@75 on 100 validation images is relu3 0.9800.'
    """
    if not approximation:
        return ""
    known = ("backend", "k", "images", "recall")
    settings = [f"{name} {value}" for name, value in approximation.items() if name not in known]
    shares = ", ".join(f"{layer} {share:.4f}" for layer, share in approximation["recall"].items())
    return (
        f"Approximate neighbours ({', '.join([approximation['backend'], *settings])}):"
        f" recall@{approximation['k']} on {approximation['images']} validation images is {shares}."
    )


def _distribution(values: Tensor) -> Histogram:
    found, counts = torch.unique(values.round(decimals=6), return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))
