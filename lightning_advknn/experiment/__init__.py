"""The stages of an experiment, each saved once under a key of all it depends on.

Backbone -> surrogates -> adversarials -> observations -> rows. A key hashes contents (weights, images, settings),
so a changed setting redoes what depends on it and nothing else, and nothing stale is ever read. Test images are
attacked and queried in shards, each a file that is whole or not there: an interrupted run goes on where it stopped.
The bank is not saved: making it again takes seconds, reading its gigabytes back would take as long.
"""

from lightning_advknn.experiment.grid import Cell, Grid, Part, cells
from lightning_advknn.experiment.machine import provenance
from lightning_advknn.experiment.run import SHARD, ExperimentRun
from lightning_advknn.experiment.settings import (
    ORIGIN,
    Experiment,
    Trained,
    Transfer,
    VictimSettings,
    experiment_of,
    experiment_parser,
)
from lightning_advknn.experiment.spread import spread

__all__ = [
    "ORIGIN",
    "SHARD",
    "Cell",
    "Experiment",
    "ExperimentRun",
    "Grid",
    "Part",
    "Trained",
    "Transfer",
    "VictimSettings",
    "cells",
    "experiment_of",
    "experiment_parser",
    "provenance",
    "spread",
]
