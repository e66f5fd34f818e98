"""Checkpoints of users, with weights of other types, names and layouts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_advknn.modules import BackboneModule
from lightning_advknn.modules.weights import load_weights
from reliability.case import Case, Outcome, evaluate, small_experiment
from reliability.networks import Small
from reliability.small_victim import digits_network, refused


def _weights(change: Callable[[dict[str, Tensor]], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    module = BackboneModule(digits_network(), ["relu", "logits"])
    torch.save(change(digits_network().state_dict()), folder / "own.pt")
    return refused(lambda: load_weights(module, folder / "own.pt", module.identity("Digits")), *words)


def _half_weights(dtype: torch.dtype, folder: Path) -> Outcome:
    module = BackboneModule(digits_network(), ["relu", "logits"])
    written = {name: tensor.to(dtype) for name, tensor in digits_network().state_dict().items()}
    save_file(written, folder / "own.safetensors")
    load_weights(module, folder / "own.safetensors", module.identity("Digits"))
    loaded = module.network.network.state_dict()
    same = all(torch.equal(loaded[name], tensor.float()) for name, tensor in written.items())
    return Outcome(f"loaded {'exactly' if same else 'otherwise'}", same)


def _given(change: Callable[[dict[str, Tensor]], Any], words: tuple[str, ...], folder: Path) -> Outcome:
    """As `_weights`, with ``attack.py --backbone.checkpoint``."""
    small_experiment(folder)
    torch.save(change(Small().state_dict()), folder / "own.pt")
    return evaluate(folder, "--backbone.checkpoint=own.pt").refused(*words)


_SAID = "An error with a remedy."
_BEFORE = "Refused before long work."

CASES = [
    Case(
        "late-weights-int8",
        "A state dict with int8 weights.",
        _SAID,
        partial(
            _weights, lambda w: {n: (100 * t).to(torch.int8) for n, t in w.items()}, ("int8", "dequantised")
        ),
    ),
    Case(
        "late-weights-bool",
        "A state dict with boolean weights.",
        _SAID,
        partial(
            _weights, lambda w: w | {"hidden.weight": w["hidden.weight"] > 0}, ("hidden.weight", "torch.bool")
        ),
    ),
    Case(
        "late-weights-complex",
        "A state dict with complex weights.",
        _SAID,
        partial(_weights, lambda w: {n: t * 1j for n, t in w.items()}, ("complex64",)),
    ),
    Case(
        "late-weights-meta",
        "A state dict without values.",
        _SAID,
        partial(_weights, lambda w: {n: t.to("meta") for n, t in w.items()}, ("no values",)),
    ),
    Case(
        "late-weights-half",
        "Weights as float16 in safetensors.",
        "Loaded exactly.",
        partial(_half_weights, torch.float16),
    ),
    Case(
        "late-weights-bfloat16",
        "Weights as bfloat16 in safetensors.",
        "Loaded exactly.",
        partial(_half_weights, torch.bfloat16),
    ),
    Case(
        "late-state-dict-ema",
        "attack.py with a checkpoint that has `state_dict` and `state_dict_ema`.",
        _BEFORE,
        partial(
            _given, lambda w: {"state_dict": w, "state_dict_ema": w}, ("['state_dict']", "['state_dict_ema']")
        ),
    ),
    Case(
        "late-model-ema",
        "A checkpoint that has `model` and `model_ema`.",
        _SAID,
        partial(_weights, lambda w: {"model": w, "model_ema": w, "epoch": 3}, ("['model']", "['model_ema']")),
    ),
    Case(
        "late-ema-nested",
        "A checkpoint with a nested list of averaged weights.",
        _SAID,
        partial(
            _weights,
            lambda w: {"state_dict": w, "ema": {"decay": 0.99, "shadow": [*w.values()]}},
            ("['ema']['shadow']",),
        ),
    ),
    Case(
        "late-module-prefix",
        "attack.py with weights of a DataParallel module.",
        _BEFORE,
        partial(_given, lambda w: {f"module.{n}": t for n, t in w.items()}, ("Without the `module.`",)),
    ),
    Case(
        "late-ema-flat",
        "A state dict with `online.` and `ema.` weights.",
        _SAID,
        partial(
            _weights,
            lambda w: {f"{part}.{n}": t for n, t in w.items() for part in ("online", "ema")},
            ("`ema.` and `online.`",),
        ),
    ),
    Case(
        "late-entries",
        "A state dict with an epoch among the weights.",
        _SAID,
        partial(_weights, lambda w: w | {"epoch": 3}, ("'epoch', a int",)),
    ),
]
