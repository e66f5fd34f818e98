"""What an experiment's checks look at, gathered one run at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_advknn import functional
from lightning_advknn.choices import VICTIMS
from lightning_advknn.evaluation import Judged, Rows, judge_rows
from lightning_advknn.experiment.settings import ORIGIN, Experiment
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, attack_run, clean_run
from lightning_advknn.reports.leaderboards.checks import Check, run_checks
from lightning_advknn.reports.leaderboards.failures import (
    Classified,
    Looked,
    attacks_move_images,
    clean_images_are_classified,
    gradients_are_there,
    same_in_other_batches,
    same_when_asked_again,
    successes_are_kept,
    surrogates_carry_over,
)


@dataclass
class Evidence:
    """An experiment's runs, and what was asked again about their images.

    Args:
        experiment: Its settings.
        layers: Names of the votes' layers.
        calibration_votes: int64 ``(N, L)``, as in `DkNN`.
        clean_rows: Rows without an attack, of the backbone.
    """

    experiment: Experiment
    layers: Sequence[str]
    calibration_votes: Tensor
    clean_rows: Rows
    runs: list[AttackRun] = field(default_factory=list)
    asked_again: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By run, as `ExperimentRun.asked_again`."""
    looked: dict[str, Looked] = field(default_factory=dict)
    """By what is differentiated, as `ExperimentRun.gradients`."""

    def __post_init__(self) -> None:
        clean = self.clean_rows
        self.clean = clean_run(clean, self._judged(clean))
        own_knn = self._classes_of(f"knn/{self.experiment.victim.layer}")
        self._classified = {
            "kNN": Classified(clean["knn_before"], None),
            "DkNN": Classified(clean["dknn_before"], None),
            ORIGIN: Classified(clean["dnn_before"], own_knn),
        }

    def add(self, method: str, attack: str, rows: Rows, **more: Any) -> None:
        """Add a run of an attack.

        Args:
            method: What was attacked.
            attack: Name of the attack.
            rows: Its rows.
            more: ``seconds``, ``queries``, ``imitates`` and ``iterates``, as in `AttackRun`.
        """
        run = attack_run(self.experiment, method, attack, rows, self._judged(rows), **more)
        self.runs.append(run)
        if run.imitates:
            known = Classified(rows["surrogate_before"], self._classes_of(run.imitates))
            self._classified.setdefault(method, known)

    def checks(self, names: Sequence[str], bounds: Mapping[str, Tensor] | None = None) -> list[Check]:
        """All checks.

        Args:
            names: Of the classes.
            bounds: As in `run_checks`.
        """
        asked = self.asked_again.items()
        return [
            *run_checks(self.runs, self.clean, bounds),
            attacks_move_images(self.runs),
            gradients_are_there(self.runs, self.looked),
            successes_are_kept(self.runs),
            surrogates_carry_over(self.runs),
            clean_images_are_classified(self.clean_rows["label"], self._classified, names),
            same_in_other_batches({name: changed["apart"] for name, changed in asked}),
            same_when_asked_again({name: changed["again"] for name, changed in asked}),
        ]

    @property
    def differentiated(self) -> list[str]:
        """What attacks differentiate, of the runs so far."""
        through = (str(run.attack.get("through", run.method)) for run in self.runs)
        return list(dict.fromkeys(name for name in through if name not in VICTIMS))

    def _judged(self, rows: Rows) -> dict[str, Judged]:
        convention = self.experiment.victim.convention
        return judge_rows(rows, self.layers, self.calibration_votes, convention)

    def _classes_of(self, victim: str) -> Tensor:
        """A victim's classes of the clean images."""
        votes, layers = self.clean_rows["votes_before"], self.layers
        chosen = [layers.index(victim.removeprefix("knn/"))] if victim != "dknn" else range(len(layers))
        return functional.dknn_prediction(votes[:, list(chosen)])
