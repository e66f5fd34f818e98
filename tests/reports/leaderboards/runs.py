"""Runs of attacks made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_advknn.choices import Norm
from lightning_advknn.evaluation import Judged
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run_of(
    entry: str,
    eps: float | None,
    l2: Sequence[float],
    linf: Sequence[float],
    wrong: str,
    credibility: Sequence[float],
    norm: Norm | None = "linf",
    **more: Any,
) -> AttackRun:
    """A run that DkNN and the backbone judge alike; in `wrong`, an x is an image that they get wrong."""
    x = torch.tensor([letter == "x" for letter in wrong])
    judged = {"dnn": Judged(x, None), "dknn": Judged(x, doubles(*credibility))}
    settings = {} if eps is None else {"eps": eps}
    attack = {"function": entry.partition(",")[0], "settings": settings}
    method = entry.partition(", ")[2]
    columns = (doubles(*l2), doubles(*linf), judged, x, torch.ones_like(x))
    return replace(AttackRun(entry, method, attack, norm, eps, *columns), **more)


# Six images, of which DkNN gets the last wrong as it is.
CLEAN = run_of("clean", 0.0, [0] * 6, [0] * 6, ".....x", [0.9, 0.8, 0.7, 0.6, 0.5, 0.2], None)


SMALL = run_of(
    "bim, s",
    0.1,
    [1.0, 1.2, 0.8, 1.0, 1.4, 0.6],
    [torch.tensor(0.1).item()] * 6,  # a float32, which is a little more
    "x....x",
    [0.1, 0.9, 0.8, 0.7, 0.6, 0.3],
    seconds=0.5,
)


LARGE = run_of(
    "bim, s",
    0.2,
    [2.0, 2.2, 1.8, 1.6, 2.6, 1.2],
    [0.2] * 6,
    "xx.x..",
    [0.4, 0.15, 0.8, 0.05, 0.6, 0.9],
    seconds=0.25,
)


LEAST = run_of(
    "least, dknn",
    None,
    [0.5, 0.5, 3.0, 0.9, 4.4, 0.0],
    [0.3, 0.3, 0.3, 0.3, 0.15, 0.0],
    "xxxxxx",
    [0.3, 0.1, 0.05, 0.25, 0.15, 0.2],
    "l2",
    seconds=2.0,
    queries=7.0,
)
