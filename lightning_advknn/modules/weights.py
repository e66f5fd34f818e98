"""Loading weights into a module, from a checkpoint of train.py or of your own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_advknn.models import LibraryNetwork
from lightning_advknn.modules.checkpoint import (
    Identity,
    check_identity,
    describe,
    is_own,
    read_checkpoint,
)

_NAMED = 5  # names that an error lists


def load_weights(module: LightningModule, path: Path, expected: Identity) -> None:
    """Load a checkpoint into a module after checking that it fits.

    Args:
        module: The module whose weights are replaced.
        path: Checkpoint from training such a module; or, for a `BackboneModule`, a state dict of its network,
            for a `LibraryNetwork` without the normalisation.
        expected: The identity that the checkpoint must state.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, unsafe, of another module, or holds NaN or infinity.
    """
    checkpoint = read_checkpoint(path)
    if is_own(checkpoint, expected):
        network: Any = module.network
        _load_own(network.network, checkpoint["state_dict"], path)
    else:
        check_identity(checkpoint, expected, str(path))
        _check_kinds(module.state_dict(), checkpoint["state_dict"], path)
        try:
            module.load_state_dict(checkpoint["state_dict"])
        except (RuntimeError, AttributeError) as error:  # AttributeError: a key is not a string
            raise ValueError(
                f"Expected the weights in {path} to fit {type(module).__name__}, but: {error} Use the"
                " checkpoint's own configuration, or train again."
            ) from error
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Expected finite weights, but `{name}` in {path} holds NaN or infinity. Train it again."
            )


def _load_own(network: nn.Module, weights: Mapping[Any, Any], path: Path) -> None:
    """Load a state dict that states no identity; raise a ValueError that names what does not fit."""
    # A `LibraryNetwork` takes its own state dict or the inner network's.
    target = network
    if isinstance(network, LibraryNetwork) and "normalize.mean" not in weights:
        target = network.model
    there = target.state_dict()
    # Files of torch before 0.4.1 lack this count, which evaluation mode does not use.
    missing = [n for n in there if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [str(name) for name in weights if name not in there]
    shapes = [
        f"{name} {_shape(weights[name])} instead of {_shape(tensor)}"
        for name, tensor in there.items()
        if name in weights and getattr(weights[name], "shape", None) != tensor.shape
    ]
    _check_kinds(there, weights, path)
    problems = (("it lacks", missing), ("it has", unexpected), ("shapes differ:", shapes))
    wrong = [f"{what} {_some(names)}" for what, names in problems if names]
    if wrong:
        raise ValueError(
            f"Expected {path} to hold the weights of {describe(network)} as configured, but"
            f" {'; '.join(wrong)}. {_remedy(there, weights)}"
        )
    target.load_state_dict(weights, strict=False)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _remedy(there: Mapping[str, Tensor], weights: Mapping[Any, Any]) -> str:
    """The remedy for weights of other names or shapes."""
    names = [str(name) for name in weights]
    prefixes = [name[: end + 1] for name in names[:1] for end, letter in enumerate(name) if letter == "."]
    for prefix in prefixes:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in there for name in names):
            return (
                f"Without the `{prefix}` before each name they are this network's: save"
                f" `{{name.removeprefix('{prefix}'): tensor for name, tensor in weights.items()}}`."
            )
    parts = sorted({name.partition(".")[0] for name in names})
    several = [
        part
        for part in parts
        if {n.partition(".")[2] for n in names if n.startswith(f"{part}.")} & there.keys()
    ]
    if several:
        return (
            f"Names below {' and '.join(f'`{part}.`' for part in several)} are this network's: save the ones"
            " you need alone, without this prefix."
        )
    return (
        f"The network's names are like {', '.join(list(there)[:3])}: rename the weights, or set the network's"
        " `settings` to those of its training."
    )


def _check_kinds(there: Mapping[str, Tensor], weights: Mapping[Any, Any], path: Path) -> None:
    """Raise a ValueError for quantised, boolean or complex weights, and those without values."""
    for name, tensor in there.items():
        given = weights.get(name)
        if not isinstance(given, Tensor) or name.endswith("num_batches_tracked"):
            continue
        if (
            given.is_meta
            or given.layout != torch.strided
            or given.is_floating_point() != tensor.is_floating_point()
            or given.dtype.itemsize < min(2, tensor.dtype.itemsize)
        ):
            kind = (
                "no values (it is on the meta device)" if given.is_meta else f"{given.dtype}, {given.layout}"
            )
            raise ValueError(
                f"Expected `{name}` in {path} to be like the network's {tensor.dtype}, but it is {kind}. Save"
                " the weights as dense floating-point numbers; quantised ones must be dequantised first."
            )
