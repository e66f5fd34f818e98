"""An experiment: checked when it is made, filled once, then read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_advknn import __version__
from lightning_advknn.choices import VICTIMS
from lightning_advknn.data.splits import ImageSplit
from lightning_advknn.evaluation import Rows, concatenate, make_rows, on_cpu
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.checks import check_data_fits, check_settings
from lightning_advknn.experiment.device import find_device
from lightning_advknn.experiment.fill import fill
from lightning_advknn.experiment.judges import Judges
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN, Experiment
from lightning_advknn.experiment.shards import Shards
from lightning_advknn.experiment.stage import Stage
from lightning_advknn.experiment.stages import Stages, imitates
from lightning_advknn.models import Surrogate
from lightning_advknn.ranks import Ranks
from lightning_advknn.search.index_settings import APPROXIMATE


class ExperimentRun:
    """Everything of an experiment: `fill` makes what is missing, all else reads what has been kept.

    Args:
        experiment: What to run.
        ranks: Processes that make this run of the same experiment too and share the work of `fill`.

    Raises:
        ValueError: If anything in it cannot work, before anything long runs.
        OSError: If a file is missing or the cache cannot be written.
    """

    def __init__(self, experiment: Experiment, ranks: Ranks | None = None) -> None:
        self.experiment, self.ranks = experiment, ranks or Ranks()
        self.cache = StageCache(Path(experiment.cache))
        self.device = find_device(experiment.device, self.ranks)
        check_settings(experiment, self.device)
        self.networks = Networks(experiment, self.device, self.cache)
        self.data = self.networks.data
        with self.ranks.first("the data"):  # which may have to be downloaded
            self.data.prepare_data()
        for cli in self.networks.trainings.values():
            cli.datamodule.share(self.data)
        self.judges = {
            name: Judges(name, self.networks, self.cache, self.ranks) for name in self.networks.backbones
        }
        shards = Shards(self.data, experiment.images, self.device)
        shape, classes = self.data.image_shape, self.data.num_classes
        # Binding tries attacks out, which is last.
        stages = Stages(shards, self.networks, self.judges, self.cache)
        _ = stages.attacks
        check_data_fits(self.networks)
        self.networks.check_functions()
        stages.attacked.bound = {
            name: attack.bind(shape, classes) for name, attack in experiment.attacks.items()
        }
        self.stages = stages
        self.networks.load_given()

    def fill(self, bounds: bool = False) -> bool:
        """Make all that is missing, every rank its share; every rank calls this.

        Args:
            bounds: Also lower bounds of all attacks, for `bounds`.

        Returns:
            Whether this rank is the one that writes results.

        Raises:
            LostRankError: If a rank has died.
            ValueError: If the ranks do not share the cache or do not compute alike, or a stage fails.
        """
        fill(self.stages, self.ranks, self.cache.folder, bounds)
        for judges in self.judges.values():
            judges.note_bank()
        return self.ranks.rank == 0

    @property
    def attacked(self) -> Judges:
        """The victims under attack."""
        return self.judges[ORIGIN]

    @property
    def transfers(self) -> Mapping[str, Judges]:
        """The victims on transfer networks, by name."""
        return {name: judges for name, judges in self.judges.items() if name != ORIGIN}

    @property
    def methods(self) -> tuple[str, ...]:
        """What attacks on logits differentiate: `ORIGIN`, then each surrogate by name."""
        return self.networks.methods

    @property
    def attacks(self) -> list[tuple[str, str | None]]:
        """What is attacked, a method or a victim (``knn``, ``dknn``), and by what; methods also by None, not at all."""
        return self.stages.attacks

    @property
    def test(self) -> ImageSplit:
        """The test images that are attacked and judged."""
        return self.stages.shards.split

    def describe(self) -> dict[str, Any]:
        """Everything the results depend on, as plain values; equal for equal experiments, whatever machine makes them.

        So an experiment that goes on on another machine stays the same one in the same folders: what the
        other machine computes differently has another key in the cache and is made again there.
        """
        experiment, data = self.experiment, self.data
        settings = {
            **self.networks.describe(),
            "victim": {
                k: v
                for k, v in asdict(experiment.victim).items()
                if k not in ("backend", "memory_gib", "shard", "index") and (k, v) != ("layers", None)
            }
            | ({"index": self.attacked.index} if self.attacked.index else {})
            | self._named_scan(),
            "attacks": {
                name: attack.describe() | ({} if attack.targets is None else {"targets": attack.targets})
                for name, attack in experiment.attacks.items()
            },
            "label_source": experiment.label_source,
            "data": {"name": data.name, "fingerprint": data.fingerprint}
            | ({"note": data.note} if data.note else {}),
            "version": __version__,
        }
        # Only where they say something: all images, given as a number or not, are one experiment.
        if not self.stages.shards.whole:
            settings["images"] = len(self.test)
            settings["sample"] = {"of": len(data.split("test")), "seed": data.split_seed}
        if experiment.joint:
            settings["joint"] = experiment.joint
        if self.transfers:
            settings["transfer"] = {name: {"layer": each.layer} for name, each in self.transfers.items()}
        return settings

    def rows(self, method: str, attack: str | None, network: str | None = None) -> Rows:
        """One row per test image, columns as in `evaluation.Rows`, on the CPU.

        Args:
            method: What is attacked, as in `attacks`.
            attack: Name of an attack; None leaves the images as they are.
            network: The transfer network whose victims judge; None for the attacked one.
        """
        label = f"{method}/{attack or 'clean'}" + (f" on {network}" if network else "")
        starts = tqdm(self.stages.shards.starts, desc=f"read {label}", disable=None, leave=False)
        judges = self.judges[network or ORIGIN]
        return concatenate([self._rows(judges, method, attack, start) for start in starts])

    def images_of(self, method: str, attack: str | None, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean and adversarial images of some rows, float32 ``(n, channels, H, W)``."""
        return self.stages.attacked.images_of(method, attack, positions)

    def cost(self, method: str, attack: str) -> tuple[float, float]:
        """Seconds of attack and queries of the victim, both for an image."""
        parts = self._kept(method, attack)
        queries = sum(int(part["queries"].sum()) for part in parts if "queries" in part)
        seconds = self.cache.seconds()[f"attack {method}/{attack}"]
        return seconds / len(self.test), queries / len(self.test)

    def iterates(self, method: str, attack: str) -> dict[str, Tensor]:
        """What is known of the images on the way to the adversarials, as `Iterates.columns`."""
        parts = self._kept(method, attack)
        names = [name for name in parts[0] if name != "queries" and all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def asked_again(self, method: str, attack: str | None) -> dict[str, Tensor]:
        """Which images got other votes when asked again: ``again`` in order, ``apart`` in other batches."""
        return self._read(self.stages.checks.asked_again(method, attack))

    def gradients(self, method: str) -> dict[str, Tensor]:
        """``positions`` of some clean images, and whether a method's gradient there is ``zero`` or ``infinite``."""
        return self._read(self.stages.checks.gradients(method))

    def neighbours(
        self, method: str, attack: str, positions: Sequence[int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, bank rows and labels of the nearest training images of clean and then of attacked images."""
        found = self._read(self.stages.checks.neighbours(method, attack, positions))
        return {layer: (found[f"rows/{layer}"], found[f"labels/{layer}"]) for layer in self.attacked.layers}

    def bounds(self) -> dict[str, Tensor]:
        """A lower bound of every attack's L2 distance on each image, by victim, where it is known (`Judges.bounds`).

        That is ``knn/<layer>`` of layers of pixels, and also ``dknn`` where such a layer votes alone.
        """
        found = {}
        for layer in self.stages.checks.pixel_layers():
            parts = [self._read(stage)["bounds"] for stage in self.stages.checks.bounds(layer)]
            found[f"knn/{layer}"] = torch.cat(parts)
            if len(self.attacked.layers) == 1:
                found["dknn"] = found[f"knn/{layer}"]
        return found

    def calibration_votes(self, network: str | None = None) -> Tensor:
        """Votes of the calibration images' own classes, int64 ``(N, L)``."""
        return self.stages.verdicts.calibration_votes(self.judges[network or ORIGIN])

    def imitated(self, method: str) -> str | None:
        """The victim that a surrogate imitates: the kNN on its layer if that votes, else DkNN; None for others."""
        if not imitates(method):
            return None
        target = self.networks.logits_fn(method)
        votes = isinstance(target, Surrogate) and target.layer in self.attacked.layers
        return f"knn/{target.layer}" if votes else "dknn"

    def _rows(self, judges: Judges, method: str, attack: str | None, start: int) -> Rows:
        stages, device = self.stages, self.device
        images, labels, ids = stages.shards.images(stages.shards.positions(start))
        before, after = (stages.verdicts.verdicts(judges, method, name, start) for name in (None, attack))
        adversarial = stages.attacked.adversarial(method, attack, start)
        surrogate = None
        if judges is self.attacked and imitates(method):
            kept = (self._read(stages.verdicts.prediction(method, name, start)) for name in (None, attack))
            first, then = (each["classes"].to(device) for each in kept)
            surrogate = first, then
        return on_cpu(make_rows(ids, labels, images, adversarial, before, after, surrogate))

    def _kept(self, method: str, attack: str) -> list[dict[str, Tensor]]:
        """What is kept of an attack beside its adversarials, by shard."""
        parts = (self.stages.attacked.attacked(method, attack, start) for start in self.stages.shards.starts)
        return [{name: part[name] for name in part if name != "adversarial"} for part in parts]

    def _read(self, stage: Stage) -> dict[str, Tensor]:
        return self.cache.read(stage.name, stage.label)

    def _named_scan(self) -> dict[str, str]:
        """The exact backend, if one is named and an attack on a victim depends on it."""
        backend = self.experiment.victim.backend
        named = backend not in ("auto", *APPROXIMATE)
        on_victims = any(method in VICTIMS for method, _ in self.attacks)
        return {"backend": backend} if named and on_victims else {}
