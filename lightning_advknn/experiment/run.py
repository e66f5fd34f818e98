"""The stages of an experiment, each saved once under a key of all it depends on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_advknn import __version__
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.attacks.wang import pixel_scale
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import ImageDataModule
from lightning_advknn.data.sample import fair_order
from lightning_advknn.data.splits import ImageSplit
from lightning_advknn.evaluation import Rows, Verdicts, concatenate, make_rows, perturb
from lightning_advknn.experiment.cache import StageCache
from lightning_advknn.experiment.device import arithmetic, find_device
from lightning_advknn.experiment.iterates import Iterates
from lightning_advknn.experiment.judges import Victims
from lightning_advknn.experiment.settings import ORIGIN, VICTIMS, Experiment, Trained, check_names
from lightning_advknn.experiment.training import instantiate, load_or_fit, training_settings
from lightning_advknn.models import FeatureNetwork, JointSurrogate, Surrogate
from lightning_advknn.modules import SurrogateModule
from lightning_advknn.modules.checks import check_data
from lightning_advknn.ranks import Ranks
from lightning_advknn.search import APPROXIMATE, check_backend, check_int8, fastest, index_settings
from lightning_advknn.storage import digest, file_digest, weights_digest

SHARD = 1000  # images attacked or queried between two saves
PIECE = 100  # the same of attacks on victims, which are the slow ones


class ExperimentRun:
    """Runs the stages of an experiment, each at its first use.

    Args:
        experiment: What to run.
        ranks: Processes that make this run of the same experiment too; `spread` shares the work out among them.

    Raises:
        ValueError: If anything in it cannot work, before any long work starts.
        OSError: If a file is missing or the cache cannot be written.
    """

    def __init__(self, experiment: Experiment, ranks: Ranks | None = None) -> None:
        self.experiment = experiment
        self.ranks = ranks or Ranks()
        self.cache = StageCache(Path(experiment.cache))
        self.device = find_device(experiment.device, self.ranks)
        check_names(experiment)
        check_backend(experiment.victim.backend)
        if experiment.victim.backend == "int8":
            check_int8(self.device)
        for attack in experiment.attacks.values():
            attack.check()
        make = partial(Victims, experiment=experiment, device=self.device, cache=self.cache, ranks=self.ranks)
        self.attacked = make(ORIGIN, experiment.backbone, experiment.victim.layer)
        self._trainings = {
            ORIGIN: self.attacked.cli,
            **{
                name: instantiate(
                    self._trained(name), SurrogateModule, experiment.seed, experiment.root, self.device
                )
                for name in experiment.surrogates
            },
        }
        self.transfers = {
            name: make(name, transfer.backbone, transfer.layer)
            for name, transfer in experiment.transfer.items()
        }
        self._trainings |= {name: victims.cli for name, victims in self.transfers.items()}
        self.data: ImageDataModule = self.attacked.data
        with self.ranks.first("the data"):  # which may have to be downloaded
            self.data.prepare_data()
        for cli in self._trainings.values():
            cli.datamodule.share(self.data)
        self._check_settings()
        for victims in (self.attacked, *self.transfers.values()):
            victims.check()
        self._attacks = {
            name: attack.bind(self.data.image_shape, self.data.num_classes)
            for name, attack in experiment.attacks.items()
        }
        self._load_given()

    def _check_settings(self) -> None:
        _ = self.attacks
        rows, victim = len(self.data.split("train")), self.experiment.victim
        if not 1 <= victim.k <= rows:
            raise ValueError(
                f"Expected `victim.k` to be in [1, {rows}] (the bank's rows), but got {victim.k}."
            )
        try:
            index_settings(victim.backend, rows, victim.index)
        except ValueError as error:
            raise ValueError(f"`victim.index`: {error}") from error
        images, there = self.experiment.images, len(self.data.split("test"))
        if images is not None and not 1 <= images <= there:
            raise ValueError(f"Expected `images` to be in [1, {there}] (the test images), but got {images}.")
        if victim.shard:
            if victim.backend in APPROXIMATE:
                raise ValueError(
                    f"Expected an exact `victim.backend` with `victim.shard`, but got {victim.backend!r}, whose recall is not"
                    " measured over several ranks. Leave `backend` out, or switch `shard` off."
                )
            for name, attack in self.experiment.attacks.items():
                if attack.on_victim:
                    raise ValueError(
                        f"Expected attacks on logits with `victim.shard`, but {name} is on a victim and reads its whole bank."
                        " Switch `shard` off, and lower `memory_gib` if the bank does not fit."
                    )
        for name, cli in self._trainings.items():
            if cli.datamodule.fingerprint != self.data.fingerprint:
                raise ValueError(
                    f"Expected {name} to be configured with the backbone's data and splits, but its"
                    f" {cli.datamodule.name} differs. Give both configurations the same `data`."
                )
            check_data(self.data, cli.model.image_shape, cli.model.num_classes)
        for name, parts in self.experiment.joint.items():
            layers = [self._trainings[part].model.layer for part in parts]
            if not layers or len(set(layers)) < len(layers):
                raise ValueError(
                    f"Expected `joint.{name}` to list surrogates of distinct layers, but got layers {layers}."
                )
        for name in self.experiment.surrogates:
            k = self._trainings[name].model.k
            if not 1 <= k < rows:
                raise ValueError(
                    f"Expected {name}'s k to be in [1, {rows - 1}] (the bank's rows less the image's own), but got {k}."
                )

    def _targets(self, attack: AttackSettings) -> Sequence[str]:
        """What an attack is run on.

        Raises:
            ValueError: If it cannot be.
        """
        there = VICTIMS if attack.on_victim else self.methods
        for given, known in ((attack.targets or (), there), (filter(None, [attack.through]), self.methods)):
            for name in given:
                if name not in known:
                    raise ValueError(
                        f"Expected {attack.function} to have `targets` and `through` among {list(known)}, but got {name!r}."
                    )
        return there if attack.targets is None else attack.targets

    def _load_given(self) -> None:
        """Load what is there already, so that a checkpoint that does not fit is refused now."""
        for victims in (self.attacked, *self.transfers.values()):
            if victims.checkpoint.is_file():
                _ = victims.network
        given = [name for name in self.experiment.surrogates if self._trained(name).checkpoint]
        if self.attacked.checkpoint.is_file():
            for name in given:
                self.surrogate(name)
        elif given:
            raise ValueError(
                f"Expected `backbone.checkpoint` beside the checkpoint of {', '.join(given)}: a surrogate belongs to one"
                " backbone. Give the backbone that it was trained on."
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """What attacks on logits differentiate: ``origin``, then each surrogate by name."""
        return (ORIGIN, *self.experiment.surrogates, *self.experiment.joint)

    @property
    def attacks(self) -> list[tuple[str, str | None]]:
        """What is attacked, one of `methods` or a victim (``knn``, ``dknn``), and by what; `methods` also by None, not at all."""
        targets: dict[str | None, Sequence[str]] = {None: self.methods}
        targets |= {name: self._targets(attack) for name, attack in self.experiment.attacks.items()}
        return [
            (method, name)
            for method in (*self.methods, *VICTIMS)
            for name in targets
            if method in targets[name]
        ]

    @cached_property
    def test(self) -> ImageSplit:
        """The test images that are attacked and judged."""
        split, n = self.data.split("test"), self.experiment.images
        if n is None or n == len(split):
            return split
        return split.select(fair_order(split.labels, self.data.split_seed)[:n])

    @property
    def starts(self) -> range:
        """Positions of the shards' first test images."""
        return range(0, len(self.test), SHARD)

    def describe(self) -> dict[str, Any]:
        """Everything the results depend on, as plain values; equal for equal experiments, whatever machine makes them.

        So an experiment that goes on on another machine stays the same one in the same folders: what the
        other machine computes differently has another key in the cache and is made again there.
        """
        experiment = self.experiment
        given = {name: self._trained(name).checkpoint for name in self._trainings}
        settings = {
            "trainings": {name: training_settings(cli) for name, cli in self._trainings.items()},
            "checkpoints": {name: file_digest(Path(path)) for name, path in given.items() if path},
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
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint}
            | ({"note": self.data.note} if self.data.note else {}),
            "version": __version__,
        }
        # Only where they say something: all images, given as a number or not, are one experiment.
        if self._sample:
            settings["images"] = len(self.test)
            settings["sample"] = {"of": len(self.data.split("test")), "seed": self.data.split_seed}
        if experiment.joint:
            settings["joint"] = experiment.joint
        if self.transfers:
            settings["transfer"] = {name: {"layer": each.layer} for name, each in self.transfers.items()}
        return settings

    def train(self) -> None:
        """Train what has not been trained."""
        for victims in (self.attacked, *self.transfers.values()):
            _ = victims.network
        _ = self.surrogates

    @property
    def backbone(self) -> FeatureNetwork:
        """The attacked network with the layers that vote, trained, on the device, in evaluation mode."""
        return self.attacked.network

    @cached_property
    def surrogates(self) -> dict[str, Surrogate]:
        """The trained surrogates by name, on the device, in evaluation mode."""
        return {name: self.surrogate(name) for name in self.experiment.surrogates}

    def untrained(self, name: str) -> tuple[SurrogateModule, Path]:
        """A surrogate's module with the backbone's weights, and where its checkpoint is or will be."""
        backbone_key = self.attacked.network_key  # trains the backbone first, if it has to be
        cli, trained = self._trainings[name], self._trained(name)
        module = cli.model
        module.backbone_checkpoint = self.attacked.checkpoint
        module.load_backbone(self.data.name)
        approximate = [module.backend, module.index] if module.backend in APPROXIMATE else []
        votes_key = digest([backbone_key, module.layer, module.k, module.metric, *approximate])
        module.votes_file = self.cache.folder / "votes" / votes_key
        key = digest([training_settings(cli), backbone_key])
        return module, Path(trained.checkpoint or self.cache.folder / "surrogate" / f"{key}.ckpt")

    def logits_fn(self, method: str) -> FeatureNetwork | Surrogate | JointSurrogate:
        """What attacks on a method differentiate."""
        if method in self.experiment.joint:
            parts = [self.surrogates[part] for part in self.experiment.joint[method]]
            return JointSurrogate(self.backbone.network, {part.layer: part.dknnb for part in parts})
        return self.backbone if method == ORIGIN else self.surrogates[method]

    def victim(self, name: str) -> DkNN:
        """``dknn``, or ``knn`` as a DkNN of its layer alone."""
        dknn = self.attacked.dknn
        return dknn if name == "dknn" else dknn.only(self.attacked.layer)

    def rows(self, method: str, attack: str | None, network: str | None = None) -> Rows:
        """One row per test image, columns as in `evaluation.Rows`, on the CPU.

        Args:
            method: What is attacked, as in `attacks`.
            attack: Name of an attack; None leaves the images as they are.
            network: The transfer network whose victims judge; None for the attacked one.
        """
        label = f"{method}/{attack or 'clean'}" + (f" on {network}" if network else "")
        progress = tqdm(self.starts, desc=label, disable=None, leave=False)
        victims = self.transfers[network] if network else self.attacked
        return concatenate([self._rows_shard(victims, method, attack, start) for start in progress])

    def adversarial(self, method: str, attack: str | None, start: int) -> Tensor:
        """The stored float32 adversarials of the `SHARD` test images from `start` on, on the device."""
        if attack is None:
            return self._shard(start)[0]
        return self._attacked(method, attack, start)["adversarial"].to(self.device)

    def cost(self, method: str, attack: str) -> tuple[float, float]:
        """Seconds of attack and queries of the victim, both for an image."""
        parts = self._beside_adversarials(method, attack)
        queries = sum(int(part["queries"].sum()) for part in parts if "queries" in part)
        seconds = self.cache.seconds()[f"attack {method}/{attack}"]
        return seconds / len(self.test), queries / len(self.test)

    def iterates(self, method: str, attack: str) -> dict[str, Tensor]:
        """What is known of the images on the way to the adversarials, as `Iterates.columns`."""
        parts = self._beside_adversarials(method, attack)
        names = [name for name in parts[0] if name != "queries" and all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _beside_adversarials(self, method: str, attack: str) -> list[dict[str, Tensor]]:
        """What is kept of an attack beside its adversarials, by shard."""
        parts = (self._attacked(method, attack, start) for start in self.starts)
        return [{name: part[name] for name in part if name != "adversarial"} for part in parts]

    def bounds(self) -> dict[str, Tensor]:
        """How far from each test image all that fools a kNN on pixels is at least, as `Victims.bounds`, by victim.

        That is ``knn/<layer>``, and also ``dknn`` where the layer votes alone. Of approximate neighbours nothing is known.
        """
        found = {}
        for layer, scale in self.scales().items():
            parts = []
            for piece in tqdm(self.bound_pieces(), desc=f"bound knn/{layer}", disable=None, leave=False):
                images, labels, _ = self.images(piece)
                find = partial(self.attacked.bounds, layer, scale, images, labels)
                parts.append(self.cache.tensors(*self.bound_file(layer, piece), find)["bounds"])
            found[f"knn/{layer}"] = torch.cat(parts)
            if len(self.attacked.layers) == 1:
                found["dknn"] = found[f"knn/{layer}"]
        return found

    def scales(self) -> dict[str, Tensor]:
        """The layers of pixels that a Euclidean kNN searches exactly, with their scale as `pixel_scale`."""
        if self.attacked.index:
            return {}
        scalings = {
            layer: pixel_scale(self.attacked.dknn.only(layer), self._shard(0)[0])
            for layer in self.attacked.layers
        }
        return {layer: scaling[0] for layer, scaling in scalings.items() if scaling is not None}

    def bound_pieces(self) -> list[range]:
        """Positions of the test images whose bounds are found between two saves."""
        return [range(start, min(start + PIECE, len(self.test))) for start in range(0, len(self.test), PIECE)]

    def bound_file(self, layer: str, piece: range) -> tuple[str, str]:
        """Name and stage of what is kept of such a piece."""
        return self.attacked.bound_file(layer, self.rows_name(piece, PIECE))

    def images_of(self, method: str, attack: str | None, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean and adversarial images of some rows, float32 ``(n, channels, H, W)``."""
        clean, _, _ = self.test.__getitems__(positions)
        images = clean.to(self.device)
        adversarial, where = images.clone(), torch.tensor(positions)
        for start in sorted({position - position % SHARD for position in positions} if attack else ()):
            own = where - where % SHARD == start
            adversarial[own] = self.adversarial(method, attack, start)[where[own] % SHARD]
        return images, adversarial

    def _rows_shard(self, victims: Victims, method: str, attack: str | None, start: int) -> Rows:
        images, labels, ids = self._shard(start)
        before, after = (self._verdicts(victims, method, name, start) for name in (None, attack))
        adversarial = self.adversarial(method, attack, start)
        imitates = victims is self.attacked and method not in (ORIGIN, *VICTIMS)
        surrogate = self.logits_fn(method) if imitates else None
        rows = make_rows(ids, labels, images, adversarial, before, after, surrogate)
        return {name: column.cpu() for name, column in rows.items()}

    def _verdicts(self, victims: Victims, method: str, attack: str | None, start: int) -> Verdicts:
        return victims.verdicts(
            *self.asked(method, attack, start), lambda: self.adversarial(method, attack, start)
        )

    def asked(self, method: str, attack: str | None, start: int) -> tuple[str, str, str]:
        """What victims are asked about: the first arguments of `Victims.verdicts`."""
        return (
            "clean" if attack is None else self._adversarial_key(method, attack),
            "clean" if attack is None else f"{method}/{attack}",
            self.rows_name(self.positions(start), SHARD),
        )

    def _attacked(self, method: str, attack: str, start: int) -> dict[str, Tensor]:
        """``adversarial`` float32, columns of `Iterates` and, of an attack on a victim, ``queries``: images asked about, by piece."""
        pieces = self.pieces(method, attack, start)
        progress = tqdm(pieces, desc=f"attack {method}/{attack}", disable=None, leave=False)
        parts = [
            self.cache.tensors(name, f"attack {method}/{attack}", partial(self.attack, method, attack, piece))
            for name, piece in progress
        ]
        # Files of earlier versions have fewer columns.
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def pieces(self, method: str, attack: str, start: int) -> list[tuple[str, range]]:
        """Files of an attack on a shard's test images, each with the positions of its images."""
        key, shard = self._adversarial_key(method, attack), self.positions(start)
        size = PIECE if method in VICTIMS else SHARD
        pieces = [shard[first : first + size] for first in range(0, len(shard), size)]
        return [(f"adversarial/{key}/{self.rows_name(piece, size)}", piece) for piece in pieces]

    def attack(self, method: str, attack: str, rows: range) -> dict[str, Tensor]:
        """What is kept of an attack on some test images; of logits, from a whole number of batches into a shard on."""
        images, labels, _ = self.images(rows)
        if self.experiment.label_source == "knn":
            start = rows.start - rows.start % SHARD
            known = self._verdicts(self.attacked, ORIGIN, None, start).knn
            labels = known[rows.start - start :][: len(rows)]
        settings = self.experiment.attacks[attack]
        function: Callable[..., Tensor] = self._attacks[attack]
        if settings.through:
            function = partial(function, surrogate=self.logits_fn(settings.through))
        target = self.victim(method) if method in VICTIMS else self.logits_fn(method)
        watched = Iterates(function, target, settings.known_norm, settings.eps)
        # DkNN is one and the same for all attacks, and is also asked to judge.
        before = target.queries if isinstance(target, DkNN) else 0
        adversarial = perturb(watched, target, images, labels, settings.precision, attack)
        made = {"adversarial": adversarial, **watched.columns(len(images))}
        if isinstance(target, DkNN):
            made["queries"] = torch.tensor([target.queries - before])
        return made

    def _adversarial_key(self, method: str, attack: str) -> str:
        settings, through = self.experiment.victim, self.experiment.attacks[attack].through
        votes = [settings.k, settings.metric, *([self.attacked.index] if self.attacked.index else [])]
        layer: str | list[str] = ORIGIN
        attacked: str | list[Any]
        if method in VICTIMS:
            layer = [self.attacked.layer] if method == "knn" else list(self.backbone.layers)
            attacked = ["votes", *votes]
        else:
            target = self.logits_fn(method)
            attacked = weights_digest(target)
            if isinstance(target, Surrogate):
                layer = target.layer
            elif isinstance(target, JointSurrogate):
                layer = list(target.backbone.layers)
        return digest(
            {
                "backbone": self.attacked.network_key,
                "attacked": attacked,
                "attack": self.experiment.attacks[attack].describe(),
                "layer": layer,
                "labels": [settings.layer, *votes] if self.experiment.label_source == "knn" else "true",
                **({"through": weights_digest(self.logits_fn(through))} if through else {}),
                **({"code": code} if (code := self.experiment.attacks[attack].code) else {}),
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

    def _named_scan(self) -> dict[str, str]:
        """The exact backend, if one is named and an attack on a victim depends on it."""
        backend = self.experiment.victim.backend
        named = backend not in ("auto", *APPROXIMATE)
        on_victims = any(attack.on_victim for attack in self.experiment.attacks.values())
        return {"backend": backend} if named and on_victims else {}

    def _shard(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and ids of the test images from `start` on, on the device."""
        return self.images(self.positions(start))

    def images(self, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Test images at some positions with labels and ids, on the device."""
        images, labels, ids = self.test.__getitems__(rows)
        return images.to(self.device), labels.to(self.device), ids.to(self.device)

    def positions(self, start: int) -> range:
        """Positions of a shard's test images."""
        return range(start, min(start + SHARD, len(self.test)))

    def rows_name(self, rows: range, size: int) -> str:
        """Name of a file on up to `size` test images; a sample of them has files of its own."""
        return f"{self._sample}{rows.start:06d}-{rows.start + size:06d}"

    @cached_property
    def _sample(self) -> str:
        """How names of files on a sample of the test images begin: with a hash of their ids; "" of all test images."""
        whole = len(self.test) == len(self.data.split("test"))
        return "" if whole else f"sample-{digest(self.test.ids.tolist())}-"

    def surrogate(self, name: str) -> Surrogate:
        """A surrogate, trained or loaded, on the device, in evaluation mode."""
        module, checkpoint = self.untrained(name)
        cli, trained = self._trainings[name], self._trained(name)
        load_or_fit(cli, trained, checkpoint, self.experiment.seed, self.cache, name)
        surrogate: Surrogate = module.surrogate
        return surrogate.to(self.device)

    def _trained(self, name: str) -> Trained:
        """How a module is made; surrogates imitate the victim's kNN, also an approximate one, unless they say otherwise."""
        if name == ORIGIN:
            return self.experiment.backbone
        if name in self.experiment.transfer:
            return self.experiment.transfer[name].backbone
        trained, victim = self.experiment.surrogates[name], self.experiment.victim
        victims: dict[str, Any] = {"k": victim.k, "metric": victim.metric}
        if victim.backend in APPROXIMATE and "backend" not in trained.overrides:
            victims |= {"backend": victim.backend, "index": victim.index}
        return replace(trained, overrides={**victims, **trained.overrides})
