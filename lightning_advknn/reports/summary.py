"""What a summary says of rows, as JSON can hold it."""

import math

import torch
from torch import Tensor

from lightning_advknn.evaluation import Rows, summarize

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


def _distribution(values: Tensor) -> Distribution:
    found, counts = torch.unique(values.round(decimals=6), return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))
