"""Attacks of users that return other things than new float32 images in [0, 1]."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_advknn.evaluation import perturb
from lightning_advknn.models import FeatureNetwork
from reliability import networks, own_attacks
from reliability.case import Case, Outcome, evaluate, in_python, small_experiment

_MODULE = own_attacks.__name__


def _returned(folder: Path, function: str, words: list[str]) -> Outcome:
    """The outcome where an attack's return value should be refused before training."""
    settings = {"function": f"{_MODULE}.{function}", "settings": {"eps": 0.1}, "targets": ["origin"]}
    small_experiment(folder, attack={"surrogates": {}, "attacks": {"mine": settings}})
    outcome = evaluate(folder).refused(function, *words)
    return outcome._replace(ok=outcome.ok and not list(folder.glob("runs/cache/backbone/*")))


def _same_as_a_copy(function: Callable[..., Tensor]) -> Outcome:
    """The outcome where an attack should give the images of `out_of_place` and change no arguments."""
    target = FeatureNetwork(networks.Small(), ["relu1"])
    images, labels = torch.rand(70, 3, 16, 16), torch.arange(70) % 4
    given = images.clone(), labels.clone()
    expected = perturb(partial(own_attacks.out_of_place, eps=0.1), target, images, labels)
    found = perturb(partial(function, eps=0.1), target, images, labels)
    same = torch.equal(found, expected) and found.dtype == torch.float32 and not found.requires_grad
    kept = torch.equal(images, given[0]) and torch.equal(labels, given[1])
    no_gradients = all(parameter.grad is None for parameter in target.parameters())
    return Outcome(
        f"{'the same' if same else 'other'} adversarials as of `out_of_place`, images and labels"
        f" {'unchanged' if kept else 'changed'}",
        same and kept and no_gradients,
    )


def _out_of_range(attack: Callable[..., Tensor]) -> Outcome:
    target = FeatureNetwork(networks.Small(), ["relu1"])
    try:
        perturb(partial(attack, eps=0.1), target, torch.rand(4, 3, 16, 16), torch.arange(4))
    except ValueError as error:
        return Outcome(str(error), attack.__name__ in str(error) and "in [0, 1]" in str(error))
    return Outcome("no error", False)


_REFUSED_RETURNS = {
    "20-own-attack-numpy": (own_attacks.as_numpy, "A NumPy array.", "numpy.ndarray"),
    "20-own-attack-tuple": (own_attacks.as_tuple, "Images and labels.", "tuple"),
    "20-own-attack-channels-last": (
        own_attacks.channels_last,
        "Images with channels last.",
        "(2, 16, 16, 3)",
    ),
    "20-own-attack-fewer": (own_attacks.fewer, "Fewer images than given.", "(1, 3, 16, 16)"),
    "20-own-attack-uint8": (own_attacks.in_bytes, "Images in uint8.", "uint8", "255"),
    "integrity-list": (own_attacks.as_list, "A list of images.", "list"),
    "integrity-none": (own_attacks.as_none, "Nothing.", "None"),
}


_GOOD_RETURNS = {
    "20-own-attack-inplace": (own_attacks.in_place, "writes into its images and labels"),
    "20-own-attack-nograd-double": (own_attacks.in_float64, "returns float64"),
    "20-own-attack-attached": (own_attacks.attached, "returns images attached to autograd's graph"),
    "integrity-one-memory": (own_attacks.one_memory, "returns the same memory for each batch"),
}


CASES = [
    *(
        Case(
            name,
            f"Your own attack returns: {what}",
            "Refused before training, by name.",
            partial(_returned, function=function.__name__, words=words),
        )
        for name, (function, what, *words) in _REFUSED_RETURNS.items()
    ),
    *(
        in_python(
            name,
            f"Your own attack {what}.",
            "The adversarials of an attack that changes nothing.",
            partial(_same_as_a_copy, function),
        )
        for name, (function, what) in _GOOD_RETURNS.items()
    ),
    in_python(
        "20-own-attack-bytes",
        "Your own attack returns images in [0, 255].",
        "Refused, by name.",
        partial(_out_of_range, own_attacks.to_255),
    ),
    in_python(
        "integrity-nan",
        "Your own attack divides zero by zero.",
        "Refused, by name.",
        partial(_out_of_range, own_attacks.not_a_number),
    ),
]
