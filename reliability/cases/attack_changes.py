"""Attacks of users that change their target or torch's settings, or fail."""

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.declare import declared
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import perturb
from lightning_advknn.models import DkNNB, FeatureNetwork, LibraryNetwork, Surrogate
from lightning_advknn.search.build import build_banks
from lightning_advknn.storage import load_tensors
from reliability import networks, own_attacks
from reliability.case import Case, Outcome, evaluate, in_python, small_experiment

_MODULE = own_attacks.__name__


def _training_mode(folder: Path) -> Outcome:
    """`train()` has no effect on a victim, so rows equal those of the same attack without it."""
    settings = {"settings": {"eps": 0.1, "steps": 10}, "targets": ["origin"]}
    ours = {
        "a_pgd": {"function": f"{_MODULE}.pgd", **settings},
        "b_mode": {"function": f"{_MODULE}.pgd_in_training_mode", **settings},
        "c_nothing": {"function": f"{_MODULE}.nothing", "targets": ["origin"]},
        "d_tutorial": {
            "function": f"{_MODULE}.tutorial_fgsm",
            "settings": {"eps": 0.1},
            "targets": ["origin"],
        },
        "e_fgsm": {"function": "fgsm", "settings": {"eps": 0.1}, "targets": ["origin"]},
    }
    small_experiment(
        folder,
        network={"init_args.function": "reliability.networks.BatchNorm"},
        backbone={"trainer.max_epochs": 2},
        attack={"surrogates": {}, "attacks": ours},
    )
    ran = evaluate(folder)
    if ran.code:
        return ran.refused(code=0)
    rows = {
        name: (folder / "runs/experiment/rows/origin" / f"{name}.csv").read_text().replace(name, "it")
        for name in ours
    }
    mode = rows["b_mode"] == rows["a_pgd"]
    tutorial = rows["d_tutorial"] == rows["e_fgsm"]
    clean = all(
        row["dnn_before"] == row["dnn_after"] for row in csv.DictReader(io.StringIO(rows["c_nothing"]))
    )
    return Outcome(
        f"with `train()` {'the same' if mode else 'other'} rows as without; the tutorial's FGSM gives"
        f" {'the same' if tutorial else 'others'} as `fgsm`; unchanged images"
        f" {'keep' if clean else 'change'} their class",
        mode and tutorial and clean,
    )


def _damage(folder: Path) -> Outcome:
    """The run ends with an error, and leaves nothing wrong in the cache for the next run."""
    ours = {
        "a_nudges": {"function": f"{_MODULE}.nudges_a_weight", "targets": ["origin"]},
        "b_fgsm": {"function": "fgsm", "settings": {"eps": 0.1}, "targets": ["origin"]},
    }
    small_experiment(folder, backbone={"trainer.max_epochs": 1}, attack={"surrogates": {}, "attacks": ours})
    outcome = evaluate(folder).refused(
        "'a_nudges'", "model.fc.bias` by up to 0.002", "nothing that it made is kept", code=1
    )
    stored = list(folder.glob("runs/cache/adversarial/**/*.safetensors"))
    without = ["--attacks={b_fgsm: {function: fgsm, settings: {eps: 0.1}, targets: [origin]}}"]
    again = evaluate(folder, *without, "--output=runs/again")
    fresh = evaluate(folder, *without, "--output=runs/fresh", "--cache=runs/fresh_cache")
    made = [
        load_tensors(path)[0]["adversarial"]
        for cache in ("cache", "fresh_cache")
        for path in folder.glob(f"runs/{cache}/adversarial/**/*.safetensors")
    ]
    same = len(made) == 2 and torch.equal(*made)
    return outcome._replace(ok=outcome.ok and not stored and same and not again.code and not fresh.code)


def _fails_later(folder: Path) -> Outcome:
    ours = {"mine": {"function": f"{_MODULE}.fails_later", "targets": ["origin"]}}
    small_experiment(folder, backbone={"trainer.max_epochs": 1}, attack={"surrogates": {}, "attacks": ours})
    return evaluate(folder).refused("attack 'mine' failed", "KeyError", "momentum", code=1)


def _put_back(attack: Callable[..., Tensor], *words: str, through: bool = False) -> Outcome:
    """The outcome where a change of the target should be an error, and be undone."""
    torch.manual_seed(0)
    network = LibraryNetwork("reliability.networks.BatchNorm", {"num_classes": 4})
    features = FeatureNetwork(network, ["model.relu2"])
    images, labels = torch.rand(40, 3, 16, 16), torch.arange(40) % 4
    banks = build_banks(features, [Batch(images, labels, torch.arange(40))], 4)
    victim = DkNN.on_banks(features, banks, k=3)
    target = victim if declared(attack) else features
    surrogate = Surrogate(network, "model.relu2", DkNNB(256, 4))
    bound: Any = partial(attack, surrogate=surrogate) if through else attack
    asked = images[:8] + 0.05 * (0.5 - images[:8])

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [features(asked), victim(asked), surrogate(asked)]

    before = answers()
    try:
        perturb(bound, target, images[:8], labels[:8])
    except ValueError as error:
        ok = all(word in str(error) for word in (attack.__name__, *words))
        ok = ok and all(torch.equal(one, other) for one, other in zip(answers(), before, strict=True))
        ok = ok and torch.get_default_dtype() == torch.float32
        return Outcome(str(error), ok and not any(module.training for module in victim.modules()))
    return Outcome("no error", False)


def _stays_in_autocast() -> Outcome:
    """A change of torch's global state is detected by the target's outputs."""
    autocast = torch.autocast("cpu", torch.bfloat16)

    def attack(logits_fn: Any, images: Tensor, labels: Tensor) -> Tensor:
        autocast.__enter__()
        return images

    try:
        perturb(attack, networks.Small().eval(), torch.rand(8, 3, 16, 16), torch.arange(8) % 4)
    except ValueError as error:
        return Outcome(str(error), "'attack'" in str(error) and "other answers" in str(error))
    finally:
        autocast.__exit__(None, None, None)
    return Outcome("no error", False)


def _counts_calls() -> Outcome:
    """A counter of calls is no change of the network."""
    target = FeatureNetwork(networks.CountsCalls(), ["relu1"])
    images, labels = torch.rand(5, 3, 16, 16), torch.arange(5) % 4
    found = perturb(partial(own_attacks.pgd, eps=0.1, steps=2), target, images, labels)
    return Outcome("attacked as any other", bool((found != images).any()))


def _frozen() -> Outcome:
    """The attack of torchattacks restores the mode that it finds: evaluation mode."""
    import torchattacks

    network = networks.BatchNorm()
    surrogate = Surrogate(network, "relu2", DkNNB(256, 4)).train()
    torchattacks.PGD(surrogate, eps=0.1, steps=2)(torch.rand(4, 3, 16, 16), torch.arange(4))
    modes = [module.training for module in (*surrogate.modules(), *network.modules())]
    return Outcome(f"{sum(modes)} of {len(modes)} modules in training mode", not any(modes))


_DAMAGES: dict[str, tuple[Callable[..., Tensor], str, list[str]]] = {
    "20-own-attack-train-mode": (
        own_attacks.zeroes_weights,
        "calls `train()` and zeroes all weights",
        ["model.conv1.0.weight", "and"],
    ),
    "integrity-inner-mode": (
        own_attacks.ends_training,
        "sets the mode of the inner network",
        ["`network.model.conv1` to training mode"],
    ),
    "integrity-half": (own_attacks.half_precision, "calls `half()` on the model", ["torch.float16"]),
    "integrity-softplus": (own_attacks.softplus, "replaces a ReLU", ["`network.model.relu2` for another"]),
    "integrity-default-dtype": (
        own_attacks.default_dtype,
        "sets torch's default dtype",
        ["torch.set_default_dtype"],
    ),
    "integrity-bank": (own_attacks.touches_bank, "changes a feature of the bank", ["features` by up to 1"]),
    "integrity-labels": (
        own_attacks.touches_labels,
        "changes the labels of the bank",
        ["labels` by up to 3"],
    ),
    "integrity-k": (own_attacks.lowers_k, "lowers a victim's k", ["k` from 3 to 1"]),
    "integrity-surrogate": (
        own_attacks.touches_surrogate,
        "changes the surrogate it goes through",
        ["surrogate.dknnb.weight"],
    ),
}


CASES = [
    *(
        in_python(
            name,
            f"Your own attack {what}.",
            "An error that names attack and change; the change is undone.",
            partial(_put_back, function, *words, through=function is own_attacks.touches_surrogate),
        )
        for name, (function, what, words) in _DAMAGES.items()
    ),
    in_python(
        "integrity-autocast",
        "Your own attack enters autocast and does not leave it.",
        "An error that names the attack: the same images get other outputs.",
        _stays_in_autocast,
    ),
    Case(
        "22-attack-touches-victim",
        "PGD that calls `model.train()` and FGSM as PyTorch's tutorial writes it, beside others.",
        "The victim stays in evaluation mode; rows are right.",
        _training_mode,
    ),
    Case(
        "22-attack-touches-victim-weight",
        "An attack adds 1e-3 to one weight, then FGSM.",
        "An error; nothing made after the change is in the cache.",
        _damage,
    ),
    Case(
        "integrity-fails-later",
        "Your own attack raises KeyError during the run.",
        "An error that names it.",
        _fails_later,
    ),
    in_python(
        "integrity-counts-calls",
        "A network that counts its calls.",
        "It is attacked as any other.",
        _counts_calls,
    ),
    in_python(
        "integrity-torchattacks",
        "torchattacks' PGD on a fresh surrogate.",
        "The backbone stays in evaluation mode.",
        _frozen,
    ),
]
