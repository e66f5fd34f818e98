"""The one list of an experiment's stages: name, key of all it depends on, how it is made, how it can be split.

Test images are attacked and queried in shards, each a file that is whole or not there. `fill` makes what is missing;
`run` reads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.voronoi import ALGORITHM
from lightning_advknn.attacks.settings import Attack, AttackSettings
from lightning_advknn.attacks.wang import pixel_scale
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import CPU_BATCH, GPU_BATCH, Verdicts, decide, perturb, predict
from lightning_advknn.experiment import rechecks
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.iterates import Iterates
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN, VICTIMS
from lightning_advknn.experiment.shards import SHARD, Shards
from lightning_advknn.experiment.votes import ImitatedKNN
from lightning_advknn.models import JointSurrogate, Surrogate
from lightning_advknn.search.index_settings import APPROXIMATE
from lightning_advknn.search.scans.quantize import fastest
from lightning_advknn.storage import digest, weights_digest

PIECE = 100  # images between two saves of an attack on a victim, which is slow
_PREDICTED = 500  # images that a surrogate classifies in a forward pass


@dataclass(frozen=True)
class Stage:
    """Something to keep.

    Args:
        name: Of its file in the cache.
        label: What its wall time counts as, such as ``attack origin/fgsm``.
        make: Makes some of its rows.
        size: Number of its rows.
        step: Rows that are made together: it can be split at multiples of this.
    """

    name: str
    label: str
    make: Callable[[range], dict[str, Tensor]]
    size: int = 1
    step: int = 1

    def parts(self, most: int) -> list[tuple[str, range]]:
        """Names and rows of up to so many parts; a single one is the stage itself."""
        size = -(-self.size // (most * self.step)) * self.step
        rows = [range(first, min(first + size, self.size)) for first in range(0, self.size, size)]
        if len(rows) == 1:
            return [(self.name, rows[0])]
        return [(f"{self.name}.parts/{part.start:06d}-{part.stop:06d}", part) for part in rows]


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
    """The stages of an experiment on its test images, and what they have kept.

    Args:
        shards: The test images.
        networks: What is attacked.
        judges: By backbone, who judges.
        bound: Attacks by name, with their settings bound.
        cache: What the stages before have left.
    """

    def __init__(
        self,
        shards: Shards,
        networks: Networks,
        judges: Mapping[str, Judges],
        bound: Mapping[str, Attack],
        cache: StageCache,
    ) -> None:
        self.shards, self.networks, self.judges = shards, networks, judges
        self.experiment = networks.experiment
        self.bound, self.cache, self.device = bound, cache, networks.device

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
            stage for pair in attacks for start in self.shards.starts for stage in self.attack(*pair, start)
        ]
        yield Group("attacks", made, attacked if on_victims else None)
        yield Group("verdicts", self._judged(attacked, attacks), attacked)
        yield Group("surrogates' classes", self._predicted())
        yield Group("checks", self._rechecked(), attacked)
        yield Group("pictures", self._pictured(), attacked)
        if bounds and (scales := self.scales()):
            yield Group("layers of pixels", [scales], attacked)
            layers = self.pixel_layers()
            yield Group("bounds", [stage for layer in layers for stage in self.bounds(layer)], attacked)
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
        targets |= {name: _targets(attack, methods) for name, attack in self.experiment.attacks.items()}
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

    # Images

    def images_of(self, method: str, attack: str | None, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean and adversarial images at some positions, float32 ``(n, channels, H, W)`` each."""
        images, _, _ = self.shards.images(positions)
        adversarial, where = images.clone(), torch.tensor(positions)
        for start in sorted({position - position % SHARD for position in positions} if attack else ()):
            own = where - where % SHARD == start
            adversarial[own] = self.adversarial(method, attack, start)[where[own] % SHARD]
        return images, adversarial

    # Attacks

    def attack(self, method: str, attack: str, start: int) -> list[Stage]:
        """An attack on a shard's test images: ``adversarial`` float32, columns of `Iterates` and, on a victim, ``queries``."""
        key, shard = self.adversarial_key(method, attack), self.shards.positions(start)
        on_victim = method in VICTIMS
        size = PIECE if on_victim else SHARD
        batch = GPU_BATCH if self.device.type == "cuda" else CPU_BATCH
        stages = []
        for first in range(0, len(shard), size):
            piece = shard[first : first + size]
            stages.append(
                Stage(
                    f"adversarial/{key}/{self.shards.file(piece, size)}",
                    f"attack {method}/{attack}",
                    partial(self._attack, method, attack, piece),
                    len(piece),
                    len(piece) if on_victim else batch,  # an attack on a victim makes batches of its own
                )
            )
        return stages

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

    def adversarial_key(self, method: str, attack: str | None) -> str:
        """Hash of all that an attack's images depend on, beside the images attacked."""
        if attack is None:
            return "clean"
        experiment, judges = self.experiment, self.judges[ORIGIN]
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
            start = rows.start - rows.start % SHARD
            known = self.verdicts(self.judges[ORIGIN], ORIGIN, None, start).knn
            labels = known[rows.start - start :][: len(rows)]
        settings = self.experiment.attacks[attack]
        function: Callable[..., Tensor] = self.bound[attack]
        if settings.through:
            function = partial(function, surrogate=self.networks.logits_fn(settings.through))
        on_victim = method in VICTIMS
        target = self.judges[ORIGIN].victim(method) if on_victim else self.networks.logits_fn(method)
        watched = Iterates(function, target, settings.known_norm, settings.eps)
        # DkNN is one and the same for all attacks, and is also asked to judge.
        before = target.queries if isinstance(target, DkNN) else 0
        adversarial = perturb(watched, target, images, labels, settings.precision, attack)
        made = {"adversarial": adversarial, **watched.columns(len(images))}
        if isinstance(target, DkNN):
            made["queries"] = torch.tensor([target.queries - before])
        return made

    # Judgements

    def calibration(self, judges: Judges) -> Stage:
        """``votes`` of the calibration images' own classes, int64 ``(N, L)``."""
        label = judges.label("query calibration")
        return Stage(f"calibration/{judges.key}", label, lambda _: judges.calibrate())

    def _judged(self, judges: Judges, attacks: Sequence[tuple[str, str | None]]) -> list[Stage]:
        first = [self.calibration(judges), *([self.recall(judges)] if judges.index else [])]
        pairs = [(pair, start) for pair in attacks for start in self.shards.starts]
        return [*first, *(self.observation(judges, *pair, start) for pair, start in pairs)]

    def recall(self, judges: Judges) -> Stage:
        """By layer, the share of true neighbours found of validation images, float64."""
        return Stage(*judges.recall_file, lambda _: judges.recall())

    def observation(self, judges: Judges, method: str, attack: str | None, start: int) -> Stage:
        """``dnn`` and ``votes`` on a shard's images, clean or attacked, as `evaluation.observe`."""
        key = digest([self.adversarial_key(method, attack), judges.key])
        name = f"observations/{key}/{self.shards.file(self.shards.positions(start))}"
        label = judges.label(f"query {method}/{attack}" if attack else "query clean")
        make = partial(self._observe, judges, method, attack, start)
        return Stage(name, label, make, len(self.shards.positions(start)))

    def _observe(
        self, judges: Judges, method: str, attack: str | None, start: int, rows: range
    ) -> dict[str, Tensor]:
        return judges.query(self.adversarial(method, attack, start), rows)

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
        weights = weights_digest(self.networks.logits_fn(method))
        key = digest([self.adversarial_key(method, attack), weights, method, arithmetic(self.device)])
        name = f"predictions/{key}/{self.shards.file(self.shards.positions(start))}"
        make = partial(self._predict, method, attack, start)
        return Stage(name, f"query surrogate {method}", make, len(self.shards.positions(start)), _PREDICTED)

    def _predict(self, method: str, attack: str | None, start: int, rows: range) -> dict[str, Tensor]:
        images = self.adversarial(method, attack, start)[rows.start : rows.stop]
        return {"classes": predict(self.networks.logits_fn(method), images, _PREDICTED)}

    def _predicted(self) -> list[Stage]:
        pairs = [(method, attack) for method, attack in self.attacks if self.imitates(method)]
        return [self.prediction(*pair, start) for pair in pairs for start in self.shards.starts]

    def imitates(self, method: str) -> bool:
        """Whether a method is a surrogate."""
        return method not in (ORIGIN, *VICTIMS)

    # What no attack can go below

    def bounds(self, layer: str) -> list[Stage]:
        """``bounds`` of the kNN on a layer of pixels, as `Judges.bounds`, by piece."""
        judges, settings = self.judges[ORIGIN], self.experiment.victim
        key = digest([self.networks.key(ORIGIN), layer, settings.k, settings.metric, ALGORITHM])
        return [
            Stage(
                f"bounds/{key}/{self.shards.file(piece, PIECE)}",
                judges.label(f"bound knn/{layer}"),
                partial(self._bound, layer, piece),
            )
            for piece in self._pieces
        ]

    def scales(self) -> Stage | None:
        """The scale of each layer of pixels, as `pixel_scale`, by layer; None where no kNN is Euclidean and exact."""
        judges = self.judges[ORIGIN]
        if judges.index or judges.settings.metric != "euclidean":
            return None
        return Stage(f"scales/{judges.key}", judges.label("find layers of pixels"), self._scales)

    def _scales(self, _rows: range) -> dict[str, Tensor]:
        judges, images = self.judges[ORIGIN], self.shards.images(self.shards.positions(0))[0]
        scalings = {layer: pixel_scale(judges.dknn.only(layer), images) for layer in judges.layers}
        return {layer: scaling[0] for layer, scaling in scalings.items() if scaling is not None}

    def pixel_layers(self) -> dict[str, Tensor]:
        """What is kept of `scales`."""
        stage = self.scales()
        return {} if stage is None else self.cache.read(stage.name, stage.label)

    @property
    def _pieces(self) -> list[range]:
        n = len(self.shards)
        return [range(start, min(start + PIECE, n)) for start in range(0, n, PIECE)]

    def _bound(self, layer: str, piece: range, _rows: range) -> dict[str, Tensor]:
        images, labels, _ids = self.shards.images(piece)
        scale = self.pixel_layers()[layer]
        return self.judges[ORIGIN].bounds(layer, scale.to(self.device), images, labels)

    # What reports judge attacks by

    def _rechecked(self) -> list[Stage]:
        attacks = [(method, attack) for method, attack in self.attacks if attack]
        through = {self.experiment.attacks[attack].through or method for method, attack in attacks}
        differentiated = [method for method in self.networks.methods if method in through]
        again = [self.asked_again(ORIGIN, None), *(self.asked_again(*pair) for pair in attacks)]
        return [*again, *(self.gradients(method) for method in differentiated)]

    def asked_again(self, method: str, attack: str | None) -> Stage:
        """Which of some images get other votes when they are asked about again: ``again`` and ``apart``, as `rechecks`."""
        judges, n = self.judges[ORIGIN], rechecks.looked_at(len(self.shards))
        key = digest([self.adversarial_key(method, attack), judges.key, n.tolist()])
        name = f"asked_again/{key}/{self.shards.file(range(len(self.shards)), len(self.shards))}"
        return Stage(name, f"query again {method}/{attack or 'clean'}", partial(self._again, method, attack))

    def _again(self, method: str, attack: str | None, _rows: range) -> dict[str, Tensor]:
        judges = self.judges[ORIGIN]
        shards = [self.observed(judges, method, attack, start) for start in self.shards.starts]
        dnn, votes = (torch.cat([shard[name] for shard in shards]) for name in ("dnn", "votes"))
        spread = rechecks.looked_at(len(self.shards))
        first = torch.arange(len(spread))
        found = {}
        for name, rows, changed in (
            ("again", first, rechecks.changed_in_order),
            ("apart", spread, rechecks.changed_in_batches),
        ):
            images = self.images_of(method, attack, rows.tolist())[1]
            found[name] = changed(judges.dknn, images, dnn[rows], votes[rows])
        return found

    def gradients(self, method: str) -> Stage:
        """Gradients at clean images of what attacks on a method differentiate: ``positions``, ``zero``, ``infinite``."""
        positions, labels = rechecks.looked_at(len(self.shards)), self.experiment.label_source
        weights, key = weights_digest(self.networks.logits_fn(method)), self.judges[ORIGIN].key
        known = [method, weights, labels, *([key] if labels == "knn" else []), arithmetic(self.device)]
        name = f"gradients/{digest([*known, positions.tolist()])}/"
        name += self.shards.file(range(len(self.shards)), len(self.shards))
        return Stage(name, f"differentiate {method}", partial(self._gradients, method, positions))

    def _gradients(self, method: str, positions: Tensor, _rows: range) -> dict[str, Tensor]:
        images, labels, _ids = self.shards.images(positions.tolist())
        if self.experiment.label_source == "knn":
            clean = [
                self.verdicts(self.judges[ORIGIN], ORIGIN, None, start).knn for start in self.shards.starts
            ]
            labels = torch.cat(clean)[positions.to(self.device)]
        found = rechecks.gradients(self.networks.logits_fn(method), images, labels)
        return {"positions": positions, **found}

    @cached_property
    def pictured(self) -> tuple[str, str]:
        """What is shown with its neighbours: the last attack on the last method or victim."""
        return next((method, attack) for method, attack in reversed(self.attacks) if attack)

    def _pictured(self) -> list[Stage]:
        method, attack = self.pictured
        judges, labels = self.judges[ORIGIN], self.shards.split.labels
        columns: dict[str, Tensor] = {"label": labels}
        for when, name in (("before", None), ("after", attack)):
            found = [self.verdicts(judges, method, name, start) for start in self.shards.starts]
            columns[f"knn_{when}"] = torch.cat([verdicts.knn for verdicts in found]).cpu()
            columns[f"dknn_{when}"] = torch.cat([verdicts.dknn for verdicts in found]).cpu()
        return [self.neighbours(method, attack, rechecks.telling_rows(columns, rechecks.PICTURED))]

    def neighbours(self, method: str, attack: str, positions: Sequence[int]) -> Stage:
        """Nearest training images of clean and then of attacked images, as `rechecks.neighbours`."""
        key = digest([self.adversarial_key(method, attack), self.judges[ORIGIN].key, list(positions)])
        name = f"neighbours/{key}/{self.shards.file(range(len(self.shards)), len(self.shards))}"
        return Stage(name, "query pictures", partial(self._neighbours, method, attack, positions))

    def _neighbours(
        self, method: str, attack: str, positions: Sequence[int], _rows: range
    ) -> dict[str, Tensor]:
        images = torch.cat(self.images_of(method, attack, positions))
        return rechecks.neighbours(self.judges[ORIGIN].dknn, images)


def _targets(attack: AttackSettings, methods: Sequence[str]) -> Sequence[str]:
    """What an attack is run on."""
    there = VICTIMS if attack.on_victim else methods
    for given, known in ((attack.targets or (), there), (filter(None, [attack.through]), methods)):
        for name in given:
            if name not in known:
                raise ValueError(
                    f"Expected {attack.function} to have `targets` and `through` among {list(known)}, but got {name!r}."
                )
    return there if attack.targets is None else attack.targets
