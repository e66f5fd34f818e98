"""Global settings of torch, such as its default dtype and autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_advknn.attacks import bim, fgsm
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import judge
from lightning_advknn.search.build import build_banks
from reliability.case import Case, Outcome, evaluate, small_experiment
from reliability.small_victim import (
    CLASSES,
    N,
    equal,
    make_images,
    make_labels,
    make_network,
    make_victim,
    refused,
)


@contextmanager
def _defaults() -> Iterator[None]:
    """Restore torch's global settings on exit."""
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")


def _default_dtype(dtype: torch.dtype, folder: Path) -> Outcome:
    small_experiment(folder)
    with _defaults():
        torch.set_default_dtype(dtype)
        return evaluate(folder).refused("default dtype", str(dtype))


def _network_sets_dtype(folder: Path) -> Outcome:
    small_experiment(folder, network={"init_args.function": "reliability.networks.SetsDefaultDtype"})
    with _defaults():
        return evaluate(folder).refused("default dtype", "float64")


def _default_device(folder: Path) -> Outcome:
    victim, images = make_victim(), make_images()
    with _defaults():
        torch.set_default_device("meta")
        return refused(lambda: victim.predict(images), "default device", "meta")


def _autocast_votes(folder: Path) -> Outcome:
    victim, images = make_victim(), make_images()
    seen: list[torch.dtype] = []
    layer = victim.network.network.get_submodule("hidden")
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        judge(victim, "relu", images)
        victim.predict(images)
        victim.calibrate([Batch(images, make_labels(), torch.arange(N))])
        build_banks(victim.network, [Batch(images, make_labels(), torch.arange(N))], CLASSES)
    return Outcome(f"the network ran in {set(seen)}", set(seen) == {torch.float32})


def _autocast_attack(folder: Path) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        return refused(lambda: fgsm(make_network(), make_images(), make_labels(), eps=0.1), "autocast")


def _inside(context: Callable[[], Any], folder: Path) -> Outcome:
    run = partial(bim, make_network(), eps=0.1, step_size=0.02, steps=5)
    expected = run(make_images(), make_labels())
    with context():
        found = run(make_images(), make_labels())
    return equal(found, expected, "adversarials")


def _matmul(folder: Path) -> Outcome:
    victim = make_victim()
    with _defaults():
        torch.set_float32_matmul_precision("medium")
        victim.predict(make_images())
        kept = torch.get_float32_matmul_precision()
    seen = victim.network.network.get_submodule("logits").seen
    return Outcome(f"the network ran in {seen}, {kept!r} is kept", (seen, kept) == ("ieee", "medium"))


_SAID = "An error with a remedy."
_BEFORE = "Refused before long work."
_RIGHT = "The same adversarials as outside."

CASES = [
    Case(
        "late-float64",
        "torch.set_default_dtype(float64), then attack.py.",
        _BEFORE,
        partial(_default_dtype, torch.float64),
    ),
    Case(
        "late-bfloat16",
        "torch.set_default_dtype(bfloat16), then attack.py.",
        _BEFORE,
        partial(_default_dtype, torch.bfloat16),
    ),
    Case(
        "late-float64-network",
        "Your own network sets the default dtype.",
        _BEFORE,
        _network_sets_dtype,
    ),
    Case("late-device", "torch.set_default_device('meta').", _SAID, _default_device),
    Case(
        "late-autocast",
        "Victims are queried under autocast.",
        "Their network runs in float32.",
        _autocast_votes,
    ),
    Case("late-autocast-attack", "An attack under autocast.", _SAID, _autocast_attack),
    Case(
        "late-inference-mode", "An attack in inference mode.", _RIGHT, partial(_inside, torch.inference_mode)
    ),
    Case("late-no-grad", "An attack under no_grad.", _RIGHT, partial(_inside, torch.no_grad)),
    Case(
        "late-matmul", "torch.set_float32_matmul_precision('medium').", "Victims decide in float32.", _matmul
    ),
]
