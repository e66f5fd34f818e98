"""The stages that reports judge attacks by: lower bounds, questions asked again, gradients, neighbours."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.voronoi import ALGORITHM
from lightning_advknn.attacks.wang import pixel_scale
from lightning_advknn.experiment import rechecks
from lightning_advknn.experiment.attack_stages import AttackStages
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.experiment.shards import Shards
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.experiment.verdict_stages import VerdictStages
from lightning_advknn.storage import digest, tensors_digest, weights_digest


class CheckStages:
    """What is asked of attacked images beside the victims' verdicts, and what is kept of it.

    Args:
        shards: The test images.
        attacked: Their adversarials.
        verdicts: What victims say of them.
        cache: What the stages before have left.
    """

    def __init__(
        self, shards: Shards, attacked: AttackStages, verdicts: VerdictStages, cache: StageCache
    ) -> None:
        self.shards, self.attacked, self.verdicts, self.cache = shards, attacked, verdicts, cache
        self.networks, self.judges, self.device = attacked.networks, attacked.judges, attacked.device

    def bounds(self, layer: str) -> list[Stage]:
        """``bounds`` of the kNN on a layer of pixels, as `Judges.bounds`, by piece."""
        judges, settings = self.judges, self.networks.experiment.victim
        key = digest([self.networks.key(ORIGIN), layer, settings.k, settings.metric, ALGORITHM])
        return [
            Stage(
                f"bounds/{key}/{self.shards.file(piece, piece=True)}",
                judges.label(f"bound knn/{layer}"),
                partial(self._bound, layer, piece),
            )
            for piece in self.shards.pieces
        ]

    def scales(self) -> Stage | None:
        """The scale of each layer of pixels, as `pixel_scale`, by layer; None where no kNN is Euclidean and exact."""
        judges = self.judges
        if judges.index or judges.settings.metric != "euclidean":
            return None
        return Stage(f"scales/{judges.key}", judges.label("find layers of pixels"), self._scales)

    def _scales(self, _rows: range) -> dict[str, Tensor]:
        judges, images = self.judges, self.shards.images(self.shards.positions(0))[0]
        scalings = {layer: pixel_scale(judges.dknn.only(layer), images) for layer in judges.layers}
        return {layer: scaling[0] for layer, scaling in scalings.items() if scaling is not None}

    def pixel_layers(self) -> dict[str, Tensor]:
        """What is kept of `scales`."""
        stage = self.scales()
        return {} if stage is None else self.cache.read(stage.name, stage.label)

    def _bound(self, layer: str, piece: range, _rows: range) -> dict[str, Tensor]:
        images, labels, _ids = self.shards.images(piece)
        scale = self.pixel_layers()[layer]
        return self.judges.bounds(layer, scale.to(self.device), images, labels)

    def asked_again(self, method: str, attack: str | None) -> Stage:
        """Which of some images get other votes when they are asked about again: ``again`` and ``apart``, as `rechecks`.

        Its key hashes the images as stored, so images that have changed since are asked about again.
        """
        n, judges = len(self.shards), self.judges
        spaced = rechecks.looked_at(n)
        rows = {"again": torch.arange(len(spaced)), "apart": spaced}
        images = {
            which: self.attacked.images_of(method, attack, some.tolist())[1] for which, some in rows.items()
        }
        name = (
            f"asked_again/{digest([self.attacked.key(method, attack), judges.key, tensors_digest(images)])}"
        )
        make = partial(self._again, method, attack, rows, images)
        return Stage(f"{name}/{self.shards.whole_file}", f"query again {method}/{attack or 'clean'}", make)

    def _again(
        self,
        method: str,
        attack: str | None,
        rows: Mapping[str, Tensor],
        images: Mapping[str, Tensor],
        _rows: range,
    ) -> dict[str, Tensor]:
        judges = self.judges
        shards = [self.verdicts.observed(judges, method, attack, start) for start in self.shards.starts]
        dnn, votes = (torch.cat([shard[name] for shard in shards]) for name in ("dnn", "votes"))
        ask = {"again": rechecks.changed_in_order, "apart": rechecks.changed_in_batches}
        return {
            which: ask[which](judges.dknn, images[which], dnn[some], votes[some])
            for which, some in rows.items()
        }

    def gradients(self, method: str) -> Stage:
        """A method's gradients at clean images, as `rechecks.gradients`, and the images' ``positions``."""
        positions, labels = rechecks.looked_at(len(self.shards)), self.networks.experiment.label_source
        weights, key = weights_digest(self.networks.logits_fn(method)), self.judges.key
        known = [method, weights, labels, *([key] if labels == "knn" else []), arithmetic(self.device)]
        name = f"gradients/{digest([*known, positions.tolist()])}/"
        name += self.shards.whole_file
        return Stage(name, f"differentiate {method}", partial(self._gradients, method, positions))

    def _gradients(self, method: str, positions: Tensor, _rows: range) -> dict[str, Tensor]:
        images, labels, _ids = self.shards.images(positions.tolist())
        if self.networks.experiment.label_source == "knn":
            clean = [
                self.verdicts.verdicts(self.judges, ORIGIN, None, start).knn for start in self.shards.starts
            ]
            labels = torch.cat(clean)[positions.to(self.device)]
        found = rechecks.gradients(self.networks.logits_fn(method), images, labels)
        return {"positions": positions, **found}

    def neighbours(self, method: str, attack: str, positions: Sequence[int]) -> Stage:
        """Nearest training images of clean and then of attacked images, as `rechecks.neighbours`."""
        key = digest([self.attacked.key(method, attack), self.judges.key, list(positions)])
        name = f"neighbours/{key}/{self.shards.whole_file}"
        return Stage(name, "query pictures", partial(self._neighbours, method, attack, positions))

    def _neighbours(
        self, method: str, attack: str, positions: Sequence[int], _rows: range
    ) -> dict[str, Tensor]:
        images = torch.cat(self.attacked.images_of(method, attack, positions))
        return rechecks.neighbours(self.judges.dknn, images)
