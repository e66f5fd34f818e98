"""Runs of attacks with the verdicts of every victim on them, from per-sample rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_advknn import functional
from lightning_advknn.attacks.balls import Norm
from lightning_advknn.evaluation import Rows
from lightning_advknn.functional import Convention

FALSE_ALARMS = 0.05
ROUNDING = 1e-6  # by which float32 may leave a ball


@dataclass(frozen=True)
class Judged:
    """What one victim makes of n images.

    Args:
        wrong: Whether it gets them wrong, bool ``(n,)``.
        credibility: Eq. (5), float64 ``(n,)``; None of the backbone, which has none.
    """

    wrong: Tensor
    credibility: Tensor | None


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack, or clean images as one.

    Args:
        entry: The attack and what it is on.
        method: What it is on: ``origin``, a surrogate, ``knn`` or ``dknn``; "" of clean images.
        attack: Its function and settings, as `AttackSettings.describe`; empty of clean images.
        norm: What its eps is measured in, or what it makes small; None of clean images.
        eps: Its ball's radius; None of a minimum-norm attack.
        l2: True L2 of the adversarials, float64 ``(n,)``.
        linf: Largest change of a pixel, float64 ``(n,)``.
        victims: What each makes of the adversarials.
        own: Whether what it is on gets them wrong, bool ``(n,)``.
        meant: Whether the label that it moves away from is the true one, bool ``(n,)``.
        seconds: Wall time of the attack, for an image.
        queries: How often the attack asked its victim, for an image.
    """

    entry: str
    method: str
    attack: Mapping[str, Any]
    norm: Norm | None
    eps: float | None
    l2: Tensor
    linf: Tensor
    victims: Mapping[str, Judged]
    own: Tensor
    meant: Tensor
    seconds: float = 0.0
    queries: float = 0.0

    def distance(self, norm: Norm | None) -> Tensor:
        """How far its adversarials are, float64 ``(n,)``."""
        return self.linf if norm == "linf" else self.l2


def judge_rows(
    rows: Rows, layers: Sequence[str], calibration_votes: Tensor, convention: Convention
) -> dict[str, Judged]:
    """Every victim's verdicts after an attack, from the votes that rows keep: no one is queried.

    Args:
        rows: As `evaluation.Rows`.
        layers: Names of the votes' layers.
        calibration_votes: int64 ``(N, L)``, as in `DkNNClassifier`.
        convention: How credibility counts ties.
    """
    votes, labels = rows["votes_after"], rows["label"]
    voters = {f"knn/{layer}": [position] for position, layer in enumerate(layers)}
    voters["dknn"] = list(range(len(layers)))
    found = {"dnn": Judged(rows["dnn_after"] != labels, None)}
    for victim, positions in voters.items():
        own = votes[:, positions]
        found[victim] = Judged(
            functional.dknn_prediction(own) != labels,
            functional.credibility(own, calibration_votes[:, positions].sum(1), convention),
        )
    return found


def alarm_threshold(credibility: Tensor) -> float:
    """The largest threshold below which at most `FALSE_ALARMS` of clean images are.

    An image whose credibility is below it is taken for an adversarial.

    Args:
        credibility: Of clean images, ``(n,)``, n > 0.

    >>> alarm_threshold(torch.tensor([0.9] * 37 + [0.3, 0.1, 0.2], dtype=torch.float64))  # 2 of 40 are below
    0.3
    """
    return float(credibility.sort().values[int(FALSE_ALARMS * len(credibility))])


def nearest(runs: Sequence[AttackRun], victim: str, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Each image's nearest adversarial that fools a victim.

    Returns:
        How far it is, float64 ``(n,)``, infinite without one; and which run it is of, the first of equals, int64 ``(n,)``.
    """
    distances = torch.stack([run.distance(norm) for run in runs])
    wrong = torch.stack([run.victims[victim].wrong for run in runs])
    distance, order = distances.where(wrong, torch.inf).sort(dim=0, stable=True)
    return distance[0], order[0]
