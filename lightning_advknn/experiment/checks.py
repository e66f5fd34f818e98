"""What can be judged of an experiment before anything long runs."""

import torch

from lightning_advknn.choices import VICTIMS
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import Experiment, check_experiment_names
from lightning_advknn.modules.checks import check_data
from lightning_advknn.search import check_backend
from lightning_advknn.search.index_settings import APPROXIMATE, index_settings
from lightning_advknn.search.scans.quantize import check_int8


def check_settings(experiment: Experiment, device: torch.device) -> None:
    """Raise a ValueError unless names, backend and attacks of an experiment exist and go together."""
    check_experiment_names(experiment)
    victim = experiment.victim
    check_backend(victim.backend)
    if victim.backend == "int8":
        check_int8(device)
    for attack in experiment.attacks.values():
        attack.check()


def _check_shards(networks: Networks) -> None:
    """Raise a ValueError unless an experiment can run with banks whose rows lie on several ranks, if it is to."""
    victim, attacks = networks.experiment.victim, networks.experiment.attacks
    if victim.shard and victim.backend in APPROXIMATE:
        raise ValueError(
            f"Expected an exact `victim.backend` with `victim.shard`, but got {victim.backend!r}, whose"
            " recall is not measured over several ranks. Leave `backend` out, or switch `shard` off."
        )
    for name, settings in attacks.items():
        if victim.shard and set(settings.targets_among(networks.methods)) & set(VICTIMS):
            raise ValueError(
                f"Expected attacks on logits with `victim.shard`, but {name} is on a victim and reads its"
                " whole bank. Switch `shard` off, and lower `memory_gib` if the bank does not fit."
            )


def check_data_fits(networks: Networks) -> None:
    """Raise a ValueError unless an experiment's settings and trainings fit its data."""
    experiment, data = networks.experiment, networks.data
    rows, victim = len(data.split("train")), experiment.victim
    if not 1 <= victim.k <= rows:
        raise ValueError(f"Expected `victim.k` to be in [1, {rows}] (the bank's rows), but got {victim.k}.")
    try:
        index_settings(victim.backend, rows, victim.index)
    except ValueError as error:
        raise ValueError(f"`victim.index`: {error}") from error
    images, there = experiment.images, len(data.split("test"))
    if images is not None and not 1 <= images <= there:
        raise ValueError(f"Expected `images` to be in [1, {there}] (the test images), but got {images}.")
    _check_shards(networks)
    for name, cli in networks.trainings.items():
        if cli.datamodule.fingerprint != data.fingerprint:
            raise ValueError(
                f"Expected {name} to be configured with the backbone's data and splits, but its"
                f" {cli.datamodule.name} differs. Give both configurations the same `data`."
            )
        check_data(data, cli.model.image_shape, cli.model.num_classes)
    for name, parts in experiment.joint.items():
        layers = [networks.trainings[part].model.layer for part in parts]
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"Expected `joint.{name}` to list surrogates of distinct layers, but got layers {layers}."
            )
    for name in experiment.surrogates:
        k = networks.trainings[name].model.k
        if not 1 <= k < rows:
            raise ValueError(
                f"Expected {name}'s k to be in [1, {rows - 1}] (the bank's rows less the image's own), but got {k}."
            )
