"""What an experiment is, as configurations write it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fr

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.evaluation import LabelSource
from lightning_advknn.functional import Convention
from lightning_advknn.search import Backend, Metric


@dataclass(frozen=True)
class Trained:
    """A module that is loaded, or trained if it has not been.

    Args:
        config: A train.py configuration.
        overrides: Arguments of the module that differ from the configuration's.
        checkpoint: Load this instead of training.
    """

    config: Path_fr
    overrides: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class VictimSettings:
    """The kNN and DkNN under attack; DkNN votes with the backbone configuration's layers.

    Args:
        layer: Layer of the kNN.
        k: Neighbours that vote.
        metric: Their distance.
        backend: What scans the bank; no vote depends on it.
        convention: How credibility counts ties.
        memory_gib: Memory for banks and searches, in GiB, of the device; banks beyond it are read from disk. None for as
            much as it takes. No vote depends on it.
    """

    layer: str = "relu3"
    k: int = 75
    metric: Metric = "cosine"
    backend: Backend = "auto"
    convention: Convention = "strict"
    memory_gib: float | None = None


@dataclass(frozen=True)
class Experiment:
    """One row of the paper's tables: a backbone, its surrogates, the attacks through each.

    Args:
        backbone: The attacked network.
        surrogates: DkNNB variants by name.
        victim: kNN and DkNN.
        attacks: By name.
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
    label_source: LabelSource = "knn"
    seed: int = 0
    root: str | None = None
    output: str = "runs/experiment"
    cache: str = "runs/cache"
    device: str = "auto"


def experiment_parser(**options: Any) -> ArgumentParser:
    """A command line of an experiment: a configuration and options that differ from it.

    Args:
        options: Of the parser.
    """
    parser = ArgumentParser(**options)
    parser.add_argument("--config", action="config", help="An experiment, such as configs/mnist/attack.yaml.")
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
    """The experiment among a command line's options."""
    return Experiment(**{each.name: getattr(options, each.name) for each in fields(Experiment)})
