"""Values of settings: words to choose from, whole numbers. Imports nothing heavy: `--help` needs this file."""

import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args

Backend = Literal["auto", "int8", "bfloat16", "float32", "triton", "faiss", "ivf", "hnsw"]
"""What searches a memory bank. All are exact but ``ivf`` and ``hnsw``, which may miss neighbours.

``triton`` is ``int8`` in one kernel, on CUDA alone. ``auto`` does not choose it.
"""

Metric = Literal["cosine", "euclidean"]
"""Distance between features: 1 - cosine similarity, or L2."""

Convention = Literal["ge", "strict", "trim_zeros"]
"""How credibility counts ties; see `functional.credibility`."""

Norm = Literal["l2", "linf"]
"""Size of a perturbation: its Euclidean length, or the largest change of a pixel; pixels are in [0, 1]."""

VICTIMS = ("knn", "dknn")
"""What an experiment attacks and asks: the kNN on one layer, and the DkNN on all."""

LabelSource = Literal["true", "knn"]
"""Label that an attack ascends: the ground truth, or the kNN's prediction on its layer (as in the authors' code)."""

GradientPrecision = Literal["float32", "winograd", "bfloat16", "tf32"]
"""How an attack computes gradients.

``float32`` computes what the network itself does. ``winograd`` is also float32, but computes convolutions of
small maps with fewer multiplications, at an error of about 5e-5 of a gradient: the choice for CPUs without
bfloat16 units. ``bfloat16`` is autocast, at an error of about 5e-2: the choice for devices with such units.
``tf32`` rounds the factors of products to 10 bits, at an error of about 1e-3: a choice for GPUs. ``winograd``
off the CPU and ``tf32`` off such GPUs are ``float32``, and a line on stderr says so.
"""

ScanPrecision = Literal["float32", "bfloat16", "int8"]
"""Number format in which a bank is scanned for candidates."""

WandbMode = Literal["offline", "online", "disabled"]
"""What Weights & Biases does: write files here, send to its server, or nothing."""


def whole(name: str, value: Any) -> int:
    """Convert an argument to `int`; accepts NumPy integers and integer tensors of one element.

    Raises:
        ValueError: If it is not an integer: bool and 5.0 are not.

    >>> import numpy
    >>> whole("k", numpy.int64(5))
    5
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"Expected `{name}` to be a whole number, but got {value!r}. Write it without a point, such as 5."
        ) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known name that is like it, or nothing.

    >>> did_you_mean("fgsn", ["bim", "fgsm"])
    ' Did you mean `fgsm`?'
    """
    names = get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" Did you mean `{names[0]}`?" if names else ""


def at_least(name: str, value: Any, least: int) -> int:
    """Convert an argument to `int`, as `whole`.

    Raises:
        ValueError: If it is not an integer or below `least`.
    """
    number = whole(name, value)
    if number < least:
        raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
    return number


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless an argument is one of the choices, which are a `Literal` of `choices`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"Expected `{name}` to be one of {known}, but got {value!r}.")
