"""Runs of attacks with the verdicts of every victim on them, from per-sample rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.choices import Norm
from lightning_advknn.evaluation import Judged, Rows, judge_rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, family

CLEAN = "clean"  # entry of images as they are
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack, or clean images as one.

    Args:
        entry: The attack and what it is on.
        method: What it is on: ``origin``, a surrogate, ``knn`` or ``dknn``; "" of clean images.
        attack: Its function and settings, as `AttackSettings.describe`; empty of clean images.
        norm: What its eps is measured in, or what it makes small; None of clean images, or if nothing says
            so.
        eps: Its ball's radius; None of a minimum-norm attack.
        l2: True L2 of the adversarials, float64 ``(n,)``.
        linf: Largest change of a pixel, float64 ``(n,)``.
        victims: What each makes of the adversarials.
        own: Whether what it is on gets them wrong, bool ``(n,)``.
        meant: Whether the label that it moves away from is the true one, bool ``(n,)``.
        seconds: Wall time of the attack, for an image.
        queries: How often the attack asked its victim, for an image.
        imitates: The victim that what it is on imitates; None unless that is a surrogate.
        iterates: As `ExperimentRun.iterates`.
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
    imitates: str | None = None
    iterates: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The entry, with its eps if it has one."""
        return self.entry if self.eps is None else f"{self.entry} at {self.eps:g}"

    @property
    def left(self) -> Tensor:
        """Images that the attack was to change and that what it is on still gets right, bool ``(n,)``."""
        return self.meant & ~self.own

    def distance(self, norm: Norm | None) -> Tensor:
        """How far its adversarials are, float64 ``(n,)``."""
        return self.linf if norm == "linf" else self.l2


def attack_run(run: ExperimentRun, method: str, attack: str | None, rows: Rows) -> AttackRun:
    """A run of an experiment's attack.

    Args:
        run: The experiment.
        method: What was attacked.
        attack: Name of the attack; None leaves the images as they are.
        rows: Its rows.
    """
    experiment, victims = run.experiment, run.attacked
    judged = judge_rows(rows, victims.layers, run.calibration_votes(), experiment.victim.convention)
    if attack is None:
        wrong = judged["dnn"].wrong
        return AttackRun(CLEAN, "", {}, None, 0.0, rows["l2"], rows["linf"], judged, wrong, ~wrong)
    settings = experiment.attacks[attack]
    seconds, queries = run.cost(method, attack)
    own = {ORIGIN: "dnn", "knn": "knn", "dknn": "dknn"}.get(method, "surrogate")
    labels = rows["knn_before"] if experiment.label_source == "knn" else rows["label"]
    return AttackRun(
        f"{family(attack)}, {method}",
        method,
        settings.describe(),
        settings.known_norm,
        settings.eps,
        rows["l2"],
        rows["linf"],
        judged,
        rows[f"{own}_after"] != rows["label"],
        labels == rows["label"],
        seconds,
        queries,
        run.imitated(method),
        run.iterates(method, attack),
    )


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
