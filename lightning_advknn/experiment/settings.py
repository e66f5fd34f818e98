"""What an experiment is, as configurations write it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, TypeVar

from lightning_advknn.attacks.settings import AttackSettings, Plain
from lightning_advknn.choices import VICTIMS, Backend, Convention, LabelSource, Metric, whole
from lightning_advknn.command_line import CommandParser
from lightning_advknn.configurations import SHIPPED, ConfigFile

ORIGIN = "origin"  # the paper's name for attacking the backbone itself
ROUNDING = 1e-6  # by which float32 may leave a ball

T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """A module that is loaded, or trained if it has not been.

    Args:
        config: A train.py configuration.
        overrides: Arguments of the module that differ from the configuration's.
        checkpoint: Load this instead of training: a checkpoint of train.py, or for a backbone also a state
            dict of its network.
    """

    config: ConfigFile
    overrides: dict[str, Plain] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class VictimSettings:
    """The kNN and DkNN under attack.

    Args:
        layer: Layer of the kNN, one of those that vote.
        layers: Layers that vote in DkNN; None for the backbone configuration's.
        k: Neighbours that vote.
        metric: Their distance.
        backend: What scans the bank. No vote depends on it, unless it is approximate: ``ivf`` or ``hnsw``.
            Then results say how many of the true neighbours it finds.
        convention: How credibility counts ties.
        memory_gib: Memory for banks and searches, in GiB, of the device; banks beyond it are read from
            disk. None for as much as it takes, but of a GPU for most of what is free. No vote depends on it.
        index: Settings of an approximate backend that differ from its defaults: ``nlist`` and ``nprobe``, or ``M`` and
            ``efSearch``.
        shard: Of several ranks, each has only some of a bank's rows, and all search for all: for banks
            that do not fit one. No vote depends on it. Attacks on the victims themselves read whole banks
            and cannot run so.
    """

    layer: str = "relu3"
    layers: list[str] | None = None
    k: int = 75
    metric: Metric = "cosine"
    backend: Backend = "auto"
    convention: Convention = "strict"
    memory_gib: float | None = None
    index: dict[str, int] | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole("victim.k", self.k))  # Python's own, of which keys know


@dataclass(frozen=True)
class Transfer:
    """Another network, with a kNN and a DkNN on the same training images, that judges stored adversarials.

    Args:
        backbone: The network; DkNN votes with its configuration's layers.
        layer: Layer of the kNN. All else is as the victim's.
    """

    backbone: Trained
    layer: str


@dataclass(frozen=True)
class Experiment:
    """One row of the paper's tables: a backbone, its surrogates, the attacks through each.

    Args:
        backbone: The attacked network.
        surrogates: DkNNB variants by name.
        joint: Surrogates of several layers as one, by name: each a list of names among `surrogates`.
        victim: kNN and DkNN.
        attacks: By name.
        transfer: Other networks by name, which judge what was made for the attacked one (Table 3).
        images: Test images to attack: so many with classes as in the whole, the same for all experiments on
            the data (`data.sample.fair_order`); None for all.
        label_source: Which label the attacks ascend.
        seed: Of training.
        root: Folder of the data files, instead of the configurations'.
        output: Folder for rows, tables and pictures.
        cache: Folder for what later runs can use again.
        device: ``auto`` is the GPU if there is one.
    """

    backbone: Trained
    surrogates: dict[str, Trained]
    attacks: dict[str, AttackSettings]
    victim: VictimSettings = field(default_factory=VictimSettings)
    joint: dict[str, list[str]] = field(default_factory=dict)
    transfer: dict[str, Transfer] = field(default_factory=dict)
    images: int | None = None
    label_source: LabelSource = "knn"
    seed: int = 0
    root: str | None = None
    output: str = "runs/experiment"
    cache: str = "runs/cache"
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("seed", self.seed))
        if self.images is not None:
            object.__setattr__(self, "images", whole("images", self.images))


def experiment_parser(**options: Any) -> CommandParser:
    """A command line of an experiment: a configuration and options that differ from it.

    Args:
        options: Of the parser.
    """
    parser = CommandParser(**options)
    parser.add_argument(
        "--config",
        action="config",
        help=f"An experiment: a file, or the name of one in {SHIPPED}, such as digits/attack.",
    )
    parser.add_class_arguments(Experiment)
    return parser


def read_experiment(arguments: Sequence[str]) -> Experiment:
    """The experiment that a command line describes.

    Raises:
        jsonargparse.ArgumentError: If it describes none.
    """
    parser = experiment_parser(exit_on_error=False)
    return experiment_of(parser.instantiate(parser.parse_args(list(arguments))))


def experiment_of(options: Any) -> Experiment:
    """The experiment among a command line's options, each attack once for every value of what it varies.

    Raises:
        ValueError: If they cannot be one.
    """
    experiment = Experiment(**{each.name: getattr(options, each.name) for each in fields(Experiment)})
    return replace(experiment, attacks=_expand(experiment.attacks))


def check_experiment_names(experiment: Experiment) -> None:
    """Raise a ValueError unless names of surrogates, attacks and networks can name files and table cells."""
    if not experiment.attacks:
        raise ValueError("Expected at least one attack in `attacks`, but got none.")
    taken = (ORIGIN, "dnn", *VICTIMS, "surrogate")
    surrogates = (*taken, *experiment.surrogates)
    for kind, names, reserved in (
        ("surrogate", experiment.surrogates, taken),
        ("joint surrogate", experiment.joint, surrogates),
        ("attack", map(family, experiment.attacks), ("clean",)),
        ("transfer network", experiment.transfer, (*surrogates, *experiment.joint)),
    ):
        for name in names:
            if name in reserved or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"Expected the name of each {kind} to have letters, digits, `_` and `-` only and not to be one of"
                    f" {list(reserved)}, which mean something else, but got {name!r}."
                )
    for name, parts in experiment.joint.items():
        for part in parts:
            if part not in experiment.surrogates:
                raise ValueError(
                    f"Expected `joint.{name}` to list surrogates, {list(experiment.surrogates)}, but got {part!r}."
                )


def combinations(values: Mapping[str, Sequence[T]]) -> list[dict[str, T]]:
    """Every combination of values by name; those of the last name change fastest.

    >>> combinations({"a": [1, 2], "b": [3, 4]})
    [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}]
    >>> combinations({})
    [{}]
    """
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


def _expand(attacks: Mapping[str, AttackSettings]) -> dict[str, AttackSettings]:
    """Each attack once for every combination of its varied settings, named ``<name>@<setting>=<value>``.

    >>> list(_expand({"pgd": AttackSettings("bim", vary={"eps": [0.1, 0.2]}), "fgsm": AttackSettings("fgsm")}))
    ['pgd@eps=0.1', 'pgd@eps=0.2', 'fgsm']
    """
    expanded = {}
    for name, attack in attacks.items():
        for varied in combinations(attack.vary):
            full = "@".join([name, *(f"{setting}={value}" for setting, value in varied.items())])
            expanded[full] = replace(attack, settings={**attack.settings, **varied}, vary={})
    return expanded


def family(name: str) -> str:
    """Name of the attack that `_expand` made this one of."""
    return name.partition("@")[0]
