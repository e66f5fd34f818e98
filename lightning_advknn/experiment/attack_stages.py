"""The stages that attack test images."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import Attack
from lightning_advknn.choices import VICTIMS
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import CPU_BATCH, GPU_BATCH, perturb
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.iterates import Iterates
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.experiment.shards import Shards
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.models import JointSurrogate, Surrogate
from lightning_advknn.search.index_settings import APPROXIMATE
from lightning_advknn.search.scans.quantize import fastest
from lightning_advknn.storage import digest, weights_digest


class AttackStages:
    """Attacks on shards of test images, and what they have kept.

    Args:
        shards: The test images.
        networks: What is attacked.
        judges: The victims under attack.
        knn_classes: Gives the kNN's classes of a shard's clean images, int64, for attacks that ascend these labels.
        cache: What the stages before have left.
    """

    def __init__(
        self,
        shards: Shards,
        networks: Networks,
        judges: Judges,
        knn_classes: Callable[[int], Tensor],
        cache: StageCache,
    ) -> None:
        self.shards, self.networks, self.judges, self.cache = shards, networks, judges, cache
        self.knn_classes, self.experiment, self.device = knn_classes, networks.experiment, networks.device
        self.bound: Mapping[str, Attack] = {}
        """Attacks by name, with their settings bound."""
        self._keys: dict[tuple[str, str], str] = {}

    def images_of(self, method: str, attack: str | None, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean and adversarial images at some positions, float32 ``(n, channels, H, W)`` each."""
        images, _, _ = self.shards.images(positions)
        adversarial, where = images.clone(), torch.tensor(positions)
        for start in sorted(
            {position - position % self.shards.size for position in positions} if attack else ()
        ):
            own = where - where % self.shards.size == start
            adversarial[own] = self.adversarial(method, attack, start)[where[own] % self.shards.size]
        return images, adversarial

    def attack(self, method: str, attack: str, start: int) -> list[Stage]:
        """An attack on a shard: ``adversarial`` float32, columns of `Iterates` and, on a victim, ``queries``."""
        key, shard = self.key(method, attack), self.shards.positions(start)
        on_victim = method in VICTIMS
        batch = GPU_BATCH if self.device.type == "cuda" else CPU_BATCH
        return [
            Stage(
                f"adversarial/{key}/{self.shards.file(piece, on_victim)}",
                f"attack {method}/{attack}",
                partial(self._attack, method, attack, piece),
                len(piece),
                len(piece) if on_victim else batch,  # an attack on a victim makes batches of its own
            )
            for piece in (self.shards.pieces_of(shard) if on_victim else [shard])
        ]

    def attacked(self, method: str, attack: str, start: int) -> dict[str, Tensor]:
        """What is kept of an attack on a shard, its pieces put together."""
        parts = [self.cache.read(stage.name, stage.label) for stage in self.attack(method, attack, start)]
        # Files of earlier versions have fewer columns.
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def adversarial(self, method: str, attack: str | None, start: int) -> Tensor:
        """The stored float32 images of a shard on the device; clean ones without an attack."""
        if attack is None:
            return self.shards.images(self.shards.positions(start))[0]
        return self.attacked(method, attack, start)["adversarial"].to(self.device)

    def key(self, method: str, attack: str | None) -> str:
        """Hash of all that an attack's images depend on, beside the images attacked."""
        if attack is None:
            return "clean"
        if (method, attack) not in self._keys:
            self._keys[method, attack] = self._key(method, attack)
        return self._keys[method, attack]

    def _key(self, method: str, attack: str) -> str:
        experiment, judges = self.experiment, self.judges
        settings, victim = experiment.attacks[attack], experiment.victim
        votes = [victim.k, victim.metric, *([judges.index] if judges.index else [])]
        layer: str | list[str] = ORIGIN
        attacked: str | list[Any]
        if method in VICTIMS:
            layer = [judges.layer] if method == "knn" else list(judges.layers)
            attacked = ["votes", *votes]
        else:
            target = self.networks.logits_fn(method)
            attacked = weights_digest(target)
            if isinstance(target, Surrogate):
                layer = target.layer
            elif isinstance(target, JointSurrogate):
                layer = list(target.backbone.layers)
        through = settings.through
        return digest(
            {
                "backbone": self.networks.key(ORIGIN),
                "attacked": attacked,
                "attack": settings.describe(),
                **({"defaults": settings.defaults} if settings.defaults else {}),
                "layer": layer,
                "labels": [victim.layer, *votes] if experiment.label_source == "knn" else "true",
                **({"through": weights_digest(self.networks.logits_fn(through))} if through else {}),
                **({"code": settings.code} if settings.code else {}),
                **({"scan": self._scan} if method in VICTIMS else {}),
                "arithmetic": arithmetic(self.device),
            }
        )

    @property
    def _scan(self) -> str:
        """What scans banks: attacks on victims look for near images with its precision, which changes no vote."""
        backend = self.experiment.victim.backend
        # Approximate ones scan single classes exactly.
        return f"{backend}: {fastest(self.device)}" if backend in ("auto", *APPROXIMATE) else backend

    def _attack(self, method: str, attack: str, piece: range, rows: range) -> dict[str, Tensor]:
        """An attack on some images of a piece; on logits, from a whole number of batches into the shard on."""
        rows = piece[rows.start : rows.stop]
        images, labels, _ = self.shards.images(rows)
        if self.experiment.label_source == "knn":
            start = rows.start - rows.start % self.shards.size
            labels = self.knn_classes(start)[rows.start - start :][: len(rows)]
        settings = self.experiment.attacks[attack]
        function: Callable[..., Tensor] = self.bound[attack]
        if settings.through:
            function = partial(function, surrogate=self.networks.logits_fn(settings.through))
        on_victim = method in VICTIMS
        target = self.judges.victim(method) if on_victim else self.networks.logits_fn(method)
        iterates = Iterates(settings.known_norm, settings.eps)
        # DkNN is one and the same for all attacks, and is also asked to judge.
        before = target.queries if isinstance(target, DkNN) else 0
        adversarial = perturb(function, target, images, labels, settings.precision, attack, iterates)
        made = {"adversarial": adversarial, **iterates.columns(len(images))}
        if isinstance(target, DkNN):
            made["queries"] = torch.tensor([target.queries - before])
        return made
