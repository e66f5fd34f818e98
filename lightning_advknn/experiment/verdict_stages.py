"""The stages that ask victims and surrogates about test images."""

from functools import partial

from torch import Tensor

from lightning_advknn.evaluation import Verdicts, decide, predict
from lightning_advknn.experiment.attack_stages import AttackStages
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.shards import Shards
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.storage import digest, weights_digest

_PREDICTED = 500  # images that a surrogate classifies in a forward pass


class VerdictStages:
    """What victims and surrogates say of shards of test images, and what is kept of it.

    Args:
        shards: The test images.
        attacked: Their adversarials.
        cache: What the stages before have left.
    """

    def __init__(self, shards: Shards, attacked: AttackStages, cache: StageCache) -> None:
        self.shards, self.attacked, self.cache, self.device = shards, attacked, cache, attacked.device

    def calibration(self, judges: Judges) -> Stage:
        """``votes`` of the calibration images' own classes, int64 ``(N, L)``."""
        label = judges.label("query calibration")
        return Stage(f"calibration/{judges.key}", label, lambda _: judges.calibrate())

    def recall(self, judges: Judges) -> Stage:
        """By layer, the share of true neighbours found of validation images, float64."""
        return Stage(*judges.recall_file, lambda _: judges.recall())

    def observation(self, judges: Judges, method: str, attack: str | None, start: int) -> Stage:
        """``dnn`` and ``votes`` on a shard's images, clean or attacked, as `evaluation.observe`."""
        key = digest([self.attacked.key(method, attack), judges.key])
        name = f"observations/{key}/{self.shards.file(self.shards.positions(start))}"
        label = judges.label(f"query {method}/{attack}" if attack else "query clean")
        make = partial(self._observe, judges, method, attack, start)
        return Stage(name, label, make, len(self.shards.positions(start)))

    def _observe(
        self, judges: Judges, method: str, attack: str | None, start: int, rows: range
    ) -> dict[str, Tensor]:
        return judges.query(self.attacked.adversarial(method, attack, start), rows)

    def observed(self, judges: Judges, method: str, attack: str | None, start: int) -> dict[str, Tensor]:
        """What is kept of an observation."""
        stage = self.observation(judges, method, attack, start)
        return self.cache.read(stage.name, stage.label)

    def calibration_votes(self, judges: Judges) -> Tensor:
        """What is kept of the calibration, int64 ``(N, L)``, on the CPU."""
        stage = self.calibration(judges)
        return self.cache.read(stage.name, stage.label)["votes"]

    def verdicts(self, judges: Judges, method: str, attack: str | None, start: int) -> Verdicts:
        """What victims say of a shard's images, on the device."""
        found = self.observed(judges, method, attack, start)
        return decide(
            found["dnn"].to(self.device),
            found["votes"].to(self.device),
            judges.layers.index(judges.layer),
            self.calibration_votes(judges).to(self.device),
            judges.settings.convention,
        )

    def prediction(self, method: str, attack: str | None, start: int) -> Stage:
        """A surrogate's own ``classes`` of a shard's images, int64."""
        weights = weights_digest(self.attacked.networks.logits_fn(method))
        key = digest([self.attacked.key(method, attack), weights, method, arithmetic(self.device)])
        name = f"predictions/{key}/{self.shards.file(self.shards.positions(start))}"
        make = partial(self._predict, method, attack, start)
        return Stage(name, f"query surrogate {method}", make, len(self.shards.positions(start)), _PREDICTED)

    def _predict(self, method: str, attack: str | None, start: int, rows: range) -> dict[str, Tensor]:
        images = self.attacked.adversarial(method, attack, start)[rows.start : rows.stop]
        return {"classes": predict(self.attacked.networks.logits_fn(method), images, _PREDICTED)}
