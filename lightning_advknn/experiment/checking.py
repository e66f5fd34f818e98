"""All checks of an experiment, with what has to be asked for them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_advknn import functional
from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import ORIGIN, VICTIMS
from lightning_advknn.ranks import Ranks
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, attack_run
from lightning_advknn.reports.leaderboards.checks import Check, check_runs
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
from lightning_advknn.reports.records.classes import names_of

LOOKED_AT = 100  # images of each run that are asked about again
ALONE, TOGETHER = 10, 7  # the first so many are asked one by one, the next half seven at a time
_BATCH = 50  # images differentiated at once


class Checking:
    """Gathers an experiment's runs one by one, and checks them all.

    Args:
        run: The experiment.
        clean: Its rows without an attack, of the backbone.
    """

    def __init__(self, run: ExperimentRun, clean: Rows) -> None:
        self.run, self.clean_rows = run, clean
        self.clean = attack_run(run, ORIGIN, None, clean)
        self.runs: list[AttackRun] = []
        n = len(run.test)
        self.positions = torch.linspace(0, n - 1, min(n, LOOKED_AT)).round().long()
        self._again: dict[str, tuple[int, int]] = {}
        self._apart: dict[str, tuple[int, int]] = {}
        self._ask("clean images", ORIGIN, None, clean)
        self._looked: dict[str, Looked] = {}
        layer = run.attacked.layer
        self._classified = {
            "kNN": Classified(clean["knn_before"], None),
            "DkNN": Classified(clean["dknn_before"], None),
            ORIGIN: Classified(clean["dnn_before"], self._votes_of(f"knn/{layer}")),
        }

    def add(self, method: str, attack: str, rows: Rows) -> None:
        """A run of an attack: its rows."""
        made = attack_run(self.run, method, attack, rows)
        self.runs.append(made)
        self._ask(f"{attack}, {method}", method, attack, rows)
        through = self.run.experiment.attacks[attack].through or method
        if through not in (*VICTIMS, *self._looked):
            self._looked[through] = self._look(through)
        if made.imitates:
            known = Classified(rows["surrogate_before"], self._votes_of(made.imitates))
            self._classified.setdefault(method, known)

    def checks(self, bounds: Mapping[str, Tensor] | None = None) -> list[Check]:
        """All checks; bounds as in `check_runs`."""
        return [
            *check_runs(self.runs, self.clean, bounds),
            attacks_move_images(self.runs),
            gradients_are_there(self.runs, self._looked),
            successes_are_kept(self.runs),
            surrogates_carry_over(self.runs),
            clean_images_are_classified(self.clean_rows["label"], self._classified, names_of(self.run.data)),
            same_in_other_batches(self._apart),
            same_when_asked_again(self._again),
        ]

    def _votes_of(self, victim: str) -> Tensor:
        """A victim's classes of the clean images."""
        votes, layers = self.clean_rows["votes_before"], self.run.attacked.layers
        chosen = [layers.index(victim.removeprefix("knn/"))] if victim != "dknn" else range(len(layers))
        return functional.dknn_prediction(votes[:, list(chosen)])

    def _ask(self, name: str, method: str, attack: str | None, rows: Rows) -> None:
        found = self.run.asked_again(method, attack)
        self._again[name], self._apart[name] = (
            (len(found[which]), int(found[which].sum())) for which in ("again", "apart")
        )

    def _look(self, method: str) -> Looked:
        """Gradients at clean images of what attacks on a method differentiate."""
        return Looked(**self.run.gradients(method))


def failed(checks: Sequence[Check]) -> list[str]:
    """A line for each check that does not hold.

    >>> failed([Check("a", True, "3 attacks"), Check("b", False, "bim, origin"), Check("c", None, "no attacks")])
    ['Check failed: b: bim, origin']
    """
    return [f"Check failed: {check.check}: {check.detail}" for check in checks if check.holds is False]


def told_by_first(ranks: Ranks, lines: Sequence[str] = ()) -> list[str]:
    """The first rank's lines on all ranks, which wait for them, so that all end alike."""
    return ranks.agree("which checks hold", lambda: list(lines))


def tell(checks: Sequence[Check], write: Callable[[str], object]) -> None:
    """Say how many checks hold."""
    hold = sum(check.holds is True for check in checks)
    empty = sum(check.holds is None for check in checks)
    write(f"Checks: {hold} hold, {len(checks) - hold - empty} do not, {empty} had nothing to look at.\n")
