"""Runs of attacks with every victim's verdicts, from per-sample rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.choices import Norm
from lightning_advknn.evaluation import Judged, Rows
from lightning_advknn.experiment.settings import ORIGIN, Experiment, family

CLEAN = "clean"  # entry of images as they are
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack, or clean images as one. Its target is what the attack is run on.

    Args:
        entry: The attack and its target.
        method: The target: ``origin``, a surrogate, ``knn`` or ``dknn``; "" of clean images.
        attack: Function and settings, as `AttackSettings.describe`; empty of clean images.
        norm: The norm of eps, or the one that the attack minimizes; None of clean images, or if it is
        unknown.
        eps: Radius of the attack's ball; None of a minimum-norm attack.
        l2: True L2 of the adversarials, float64 ``(n,)``.
        linf: Largest change of a pixel, float64 ``(n,)``.
        victims: Each victim's verdicts on the adversarials.
        own: Whether the target misclassifies the adversarial, bool ``(n,)``.
        meant: Whether the attack moves away from the true label, bool ``(n,)``.
        seconds: Wall time of the attack for an image.
        queries: Queries of the victim for an image.
        imitates: The victim that the target imitates; None unless the target is a surrogate.
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
        """Images on which the attack failed: the target still says the true class, bool ``(n,)``."""
        return self.meant & ~self.own

    def distance(self, norm: Norm | None) -> Tensor:
        """Distance of each adversarial, float64 ``(n,)``: Linf for ``linf``, else true L2."""
        return self.linf if norm == "linf" else self.l2


def clean_run(rows: Rows, victims: Mapping[str, Judged]) -> AttackRun:
    """Clean images as a run of an attack.

    Args:
        rows: Without an attack, of the backbone.
        victims: Verdicts on them.
    """
    wrong = victims["dnn"].wrong
    return AttackRun(CLEAN, "", {}, None, 0.0, rows["l2"], rows["linf"], victims, wrong, ~wrong)


def attack_run(
    experiment: Experiment,
    method: str,
    attack: str,
    rows: Rows,
    victims: Mapping[str, Judged],
    **more: Any,
) -> AttackRun:
    """A run of an experiment's attack.

    Args:
        experiment: Its settings.
        method: What was attacked.
        attack: Name of the attack.
        rows: Its rows.
        victims: Verdicts on the adversarials.
        more: Further fields of `AttackRun`, from ``seconds`` on.
    """
    settings = experiment.attacks[attack]
    target = {ORIGIN: "dnn", "knn": "knn", "dknn": "dknn"}.get(method, "surrogate")
    labels = rows["knn_before"] if experiment.label_source == "knn" else rows["label"]
    return AttackRun(
        f"{family(attack)}, {method}",
        method,
        settings.describe(),
        settings.known_norm,
        settings.eps,
        rows["l2"],
        rows["linf"],
        victims,
        rows[f"{target}_after"] != rows["label"],
        labels == rows["label"],
        **more,
    )


def alarm_threshold(credibility: Tensor) -> float:
    """The largest threshold with at most a share of `FALSE_ALARMS` of clean images below it.

    An image whose credibility is below the threshold counts as detected.

    Args:
        credibility: Of clean images, ``(n,)``, n > 0.

    >>> alarm_threshold(torch.tensor([0.9] * 37 + [0.3, 0.1, 0.2], dtype=torch.float64))  # 2 of 40 are below
    0.3
    """
    return float(credibility.sort().values[int(FALSE_ALARMS * len(credibility))])


def nearest(runs: Sequence[AttackRun], victim: str, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Each image's nearest adversarial that fools a victim.

    Returns:
        Its distance, float64 ``(n,)``, infinite if there is none; and the index of its run, the first of
        equals, int64 ``(n,)``.
    """
    distances = torch.stack([run.distance(norm) for run in runs])
    wrong = torch.stack([run.victims[victim].wrong for run in runs])
    distance, order = distances.where(wrong, torch.inf).sort(dim=0, stable=True)
    return distance[0], order[0]
