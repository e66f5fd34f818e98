"""The one list of an experiment's stages, in order; `fill` makes what is missing, `run` reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_advknn.choices import VICTIMS
from lightning_advknn.experiment import rechecks
from lightning_advknn.experiment.attack_stages import AttackStages
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.check_stages import CheckStages
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.experiment.shards import Shards
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.experiment.verdict_stages import VerdictStages
from lightning_advknn.experiment.votes import ImitatedKNN


@dataclass(frozen=True)
class Group:
    """Stages of which none depends on another.

    Args:
        what: They are, in words.
        stages: In order.
        judges: Whose bank they need; None if they need none.
    """

    what: str
    stages: Sequence[Stage]
    judges: Judges | None = None


class Stages:
    """All stages of an experiment on its test images.

    Args:
        shards: The test images.
        networks: What is attacked.
        judges: By backbone, who judges.
        cache: What has been made.
    """

    def __init__(
        self, shards: Shards, networks: Networks, judges: Mapping[str, Judges], cache: StageCache
    ) -> None:
        self.shards, self.networks, self.judges = shards, networks, judges
        self.experiment, attacked = networks.experiment, judges[ORIGIN]
        self.attacked = AttackStages(shards, networks, attacked, self._knn_classes, cache)
        self.verdicts = VerdictStages(shards, self.attacked, cache)
        self.checks = CheckStages(shards, self.attacked, self.verdicts, cache)

    def groups(self, bounds: bool = False) -> Iterator[Group]:
        """All stages on trained networks, in order: each group depends on those before it alone.

        Args:
            bounds: Also lower bounds of all attacks.
        """
        attacked, *others = self.judges.values()
        clean: list[tuple[str, str | None]] = [(ORIGIN, None)]
        attacks = [(method, attack) for method, attack in self.attacks if attack]
        yield Group("verdicts on clean images", self._judged(attacked, clean), attacked)
        on_victims = any(method in VICTIMS for method, _ in attacks)
        made = [
            stage
            for pair in attacks
            for start in self.shards.starts
            for stage in self.attacked.attack(*pair, start)
        ]
        yield Group("attacks", made, attacked if on_victims else None)
        yield Group("verdicts", self._judged(attacked, attacks), attacked)
        yield Group("surrogates' classes", self._predicted())
        yield Group("checks", self._rechecked(), attacked)
        yield Group("pictures", self._pictured(), attacked)
        if bounds and (scales := self.checks.scales()):
            yield Group("layers of pixels", [scales], attacked)
            layers = self.checks.pixel_layers()
            yield Group(
                "bounds", [stage for layer in layers for stage in self.checks.bounds(layer)], attacked
            )
        for judges in others:
            yield Group(f"verdicts of {judges.name}", self._judged(judges, [*clean, *attacks]), judges)

    @cached_property
    def attacks(self) -> list[tuple[str, str | None]]:
        """What is attacked, a method or a victim, and by what; methods also by None, not at all.

        Raises:
            ValueError: If an attack cannot be run on one of its targets.
        """
        methods = self.networks.methods
        targets: dict[str | None, Sequence[str]] = {None: methods}
        targets |= {name: attack.targets_among(methods) for name, attack in self.experiment.attacks.items()}
        return [
            (method, name) for method in (*methods, *VICTIMS) for name in targets if method in targets[name]
        ]

    # Trainings

    def votes(self, imitated: ImitatedKNN) -> dict[str, Stage]:
        """By split, ``votes`` on training and validation images that a surrogate learns from, int64 ``(n, C)``."""
        return {
            split: Stage(
                f"votes/{imitated.key}/{split}",
                "votes for surrogates",
                partial(self._votes, imitated, split),
                len(self.networks.data.split(split)),
            )
            for split in ("train", "val")
        }

    def _votes(self, imitated: ImitatedKNN, split: str, rows: range) -> dict[str, Tensor]:
        return {"votes": imitated.votes(split, rows)}

    # What they are made of

    def _knn_classes(self, start: int) -> Tensor:
        return self.verdicts.verdicts(self.judges[ORIGIN], ORIGIN, None, start).knn

    def _judged(self, judges: Judges, attacks: Sequence[tuple[str, str | None]]) -> list[Stage]:
        first = [self.verdicts.calibration(judges), *([self.verdicts.recall(judges)] if judges.index else [])]
        pairs = [(pair, start) for pair in attacks for start in self.shards.starts]
        return [*first, *(self.verdicts.observation(judges, *pair, start) for pair, start in pairs)]

    def _predicted(self) -> list[Stage]:
        pairs = [(method, attack) for method, attack in self.attacks if imitates(method)]
        return [self.verdicts.prediction(*pair, start) for pair in pairs for start in self.shards.starts]

    def _rechecked(self) -> list[Stage]:
        attacks = [(method, attack) for method, attack in self.attacks if attack]
        through = {self.experiment.attacks[attack].through or method for method, attack in attacks}
        differentiated = [method for method in self.networks.methods if method in through]
        again = [self.checks.asked_again(ORIGIN, None), *(self.checks.asked_again(*pair) for pair in attacks)]
        return [*again, *(self.checks.gradients(method) for method in differentiated)]

    @cached_property
    def pictured(self) -> tuple[str, str]:
        """What is shown with its neighbours: the last attack on the last method or victim."""
        return next((method, attack) for method, attack in reversed(self.attacks) if attack)

    def _pictured(self) -> list[Stage]:
        method, attack = self.pictured
        judges, labels = self.judges[ORIGIN], self.shards.split.labels
        columns: dict[str, Tensor] = {"label": labels}
        for when, name in (("before", None), ("after", attack)):
            found = [self.verdicts.verdicts(judges, method, name, start) for start in self.shards.starts]
            columns[f"knn_{when}"] = torch.cat([verdicts.knn for verdicts in found]).cpu()
            columns[f"dknn_{when}"] = torch.cat([verdicts.dknn for verdicts in found]).cpu()
        return [self.checks.neighbours(method, attack, rechecks.telling_rows(columns, rechecks.PICTURED))]


def imitates(method: str) -> bool:
    """Whether a method is a surrogate."""
    return method not in (ORIGIN, *VICTIMS)
