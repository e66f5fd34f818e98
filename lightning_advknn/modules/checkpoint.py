"""What a checkpoint holds, and refusing the wrong one."""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_advknn.data import ImageDataModule
from lightning_advknn.functional import check_defaults
from lightning_advknn.models import (
    ASKED,
    FeatureNetwork,
    LibraryNetwork,
    check_function,
    device_of,
    kept_modes,
)
from lightning_advknn.storage import atomic_path

IDENTITY = "lightning_advknn"  # key under which a checkpoint says what it holds
_NAMED = 5  # names that an error lists
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # of training

Identity = dict[str, str | int | list[int]]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, whole or not there also when the disk is full.

    Lightning itself writes them to the system's temporary folder and moves them: onto another disk by copying, of which a part
    may remain.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; on a place that is not a local path, as Lightning does."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # writing a file itself, torch.save would not say why it cannot
        torch.save(checkpoint, buffer)
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def describe(network: nn.Module) -> str:
    """The architecture's import path."""
    if isinstance(network, LibraryNetwork):
        return network.function
    return f"{type(network).__module__}.{type(network).__qualname__}"


def check_identity(checkpoint: Mapping[str, Any], expected: Identity, source: str) -> None:
    """Raise a ValueError unless a checkpoint is of the expected kind, architecture, data set and class count."""
    identity = checkpoint.get(IDENTITY)
    if not isinstance(identity, dict):
        raise ValueError(
            f"Expected {source} to be a checkpoint written by this project's train.py, but it says nothing of itself."
            + (" Only a backbone may have weights of your own." if expected["kind"] != "backbone" else "")
        )
    wrong = [
        f"{name} is {identity.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if identity.get(name) != value
    ]
    if wrong:
        raise ValueError(
            f"Expected {source} to fit this configuration, but its {'; its '.join(wrong)}."
            " Use the checkpoint's own configuration, or train a new one."
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or weights of one's own, without ever running code from it.

    Args:
        path: A checkpoint of train.py; or a state dict, alone or under ``state_dict`` beside no other
            weights, that torch.save wrote; or one in safetensors format, whose name then ends in
            ``.safetensors``.

    Returns:
        The checkpoint; of weights of one's own, their ``state_dict`` alone.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is truncated, corrupt, not a checkpoint, would have to run code to load, or holds
            several networks' weights, such as averaged ones beside others.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint at {path}, but there is none. Train it with `python train.py fit --config ...`."
        )
    if path.suffix == ".safetensors":
        try:
            return {"state_dict": load_file(path)}
        except SafetensorError as error:
            raise ValueError(
                f"Expected {path} to be a whole safetensors file, but reading it failed: {error}. It is truncated, corrupt or"
                " in another format."
            ) from error
    _check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected {path} to hold only tensors and plain values, but loading it would run code or it is no"
            " checkpoint. Refused: use a checkpoint from a source you trust, saved again as plain types."
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        if "TorchScript" in str(error):
            raise ValueError(
                f"Expected {path} to be a state dict, but it is a TorchScript archive, which is code. Save"
                " `torch.jit.load(path).state_dict()`."
            ) from error
        raise ValueError(
            f"Expected {path} to be a whole checkpoint, but reading it failed: {error}. It is truncated or corrupt."
        ) from error
    if _is_weights(checkpoint):
        return {"state_dict": dict(checkpoint)}
    if (
        isinstance(checkpoint, dict)
        and IDENTITY in checkpoint
        and isinstance(checkpoint.get("state_dict"), dict)
    ):
        return checkpoint
    return {"state_dict": _only_weights(checkpoint, path)}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _only_weights(content: Any, path: Path) -> dict[Any, Any]:
    """What a file has under ``state_dict``, if it holds no other weights; raise a ValueError that says which to choose from."""
    found = dict(_weights_in(content))
    held = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(held, dict) and found.keys() <= {"['state_dict']"}:
        return held
    if found:
        raise ValueError(
            f"Expected {path} to hold one network's weights, alone or under `state_dict`, but it has some under"
            f" {', '.join(found)}. Save those that you mean alone: `torch.save(torch.load(path,"
            f" weights_only=True){next(iter(found))}, 'chosen.pt')`."
        )
    entries = content if isinstance(content, dict) else {}
    others = [
        f"{name!r}, a {type(value).__name__}"
        for name, value in entries.items()
        if not isinstance(value, Tensor)
    ]
    but = f"it also has {'; '.join(others[:_NAMED])}" if 0 < len(others) < len(entries) else "it does not"
    raise ValueError(
        f"Expected {path} to hold a `state_dict`, or to be one of tensors alone, but {but}. Save what"
        " `network.state_dict()` gives."
    )


def _weights_in(content: Any, place: str = "", depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Tensors by name, or lists of them, such as averaged weights beside others, by the place at which a file has them."""
    if not isinstance(content, dict) or "param_groups" in content:  # an optimizer's
        return
    for name, value in content.items():
        at = f"{place}[{name!r}]"
        tensors = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        # Statistics and states of random numbers are vectors at most.
        if all(isinstance(each, Tensor) for each in tensors) and any(each.ndim > 1 for each in tensors):
            yield at, value
        elif depth:
            yield from _weights_in(value, at, depth - 1)


def is_own(checkpoint: Mapping[str, Any], expected: Identity) -> bool:
    """Whether it holds a backbone's weights that do not come from train.py, so that nothing but they can be checked."""
    return IDENTITY not in checkpoint and expected["kind"] == "backbone"


def _check_sums(path: Path) -> None:
    """Raise a ValueError if a checkpoint's file is not what was written: torch.load does not look at its checksums."""
    if not zipfile.is_zipfile(path):
        return  # torch.load says what it is
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        changed = str(error)
    if changed is not None:
        raise ValueError(
            f"Expected {path} to be as it was written, but its checksums say otherwise ({changed}). It is corrupt: copy it"
            " again, or delete it and train again."
        )


def load_weights(module: LightningModule, path: Path, expected: Identity) -> None:
    """Load a checkpoint into a module after checking that it belongs there.

    Args:
        module: Whose weights are replaced.
        path: Checkpoint written while training such a module; or, for a `BackboneModule`, a state dict of its network, without
            the normalisation if that is a `LibraryNetwork`.
        expected: What the checkpoint must say of itself.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, unsafe, of something else, or holds NaN or infinity.
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
        except (RuntimeError, AttributeError) as error:  # AttributeError: a key is no text
            raise ValueError(
                f"Expected the weights in {path} to fit {type(module).__name__}, but: {error}"
            ) from error
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Expected finite weights, but `{name}` in {path} holds NaN or infinity. Train it again."
            )


def _load_own(network: nn.Module, weights: Mapping[Any, Any], path: Path) -> None:
    """Load a state dict that says nothing of itself; raise a ValueError that names what does not fit."""
    # Those of a library's network may be the library's own, or what `state_dict()` of the whole gives.
    target = network
    if isinstance(network, LibraryNetwork) and "normalize.mean" not in weights:
        target = network.model
    there = target.state_dict()
    # Files of torch before 0.4.1 lack this count, which evaluation does not use.
    missing = [n for n in there if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [str(name) for name in weights if name not in there]
    shapes = [
        f"{name} {tuple(weights[name].shape) if isinstance(weights[name], Tensor) else type(weights[name]).__name__} instead of"
        f" {tuple(tensor.shape)}"
        for name, tensor in there.items()
        if name in weights and getattr(weights[name], "shape", None) != tensor.shape
    ]
    _check_kinds(there, weights, path)
    wrong = [
        f"{what} {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
        for what, names in (("it lacks", missing), ("it has", unexpected), ("shapes differ:", shapes))
        if names
    ]
    if wrong:
        raise ValueError(
            f"Expected {path} to hold the weights of {describe(network)} as configured, but {'; '.join(wrong)}."
            f" {_remedy(there, weights)}"
        )
    target.load_state_dict(weights, strict=False)


def _remedy(there: Mapping[str, Tensor], weights: Mapping[Any, Any]) -> str:
    """What to do about weights under other names or of other shapes."""
    names = [str(name) for name in weights]
    prefixes = [name[: end + 1] for name in names[:1] for end, letter in enumerate(name) if letter == "."]
    for prefix in prefixes:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in there for name in names):
            return (
                f"Without the `{prefix}` before each name they are this network's: save `{{name.removeprefix('{prefix}'): tensor"
                f" for name, tensor in weights.items()}}`."
            )
    parts = sorted({name.partition(".")[0] for name in names})
    several = [
        part
        for part in parts
        if {n.partition(".")[2] for n in names if n.startswith(f"{part}.")} & there.keys()
    ]
    if several:
        return (
            f"Names below {' and '.join(f'`{part}.`' for part in several)} are this network's: save those that you mean alone,"
            " without what is before."
        )
    return (
        f"Its names are to be like {', '.join(list(there)[:3])}: rename them (a prefix can be cut off), or set the network's"
        " `settings` to those that it was trained with."
    )


def _check_kinds(there: Mapping[str, Tensor], weights: Mapping[Any, Any], path: Path) -> None:
    """Raise a ValueError where loading would make other numbers of a file's: of quantised, boolean or complex ones, or of none."""
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
                "no values (it is on the device meta)" if given.is_meta else f"{given.dtype}, {given.layout}"
            )
            raise ValueError(
                f"Expected `{name}` in {path} to be like the network's {tensor.dtype}, but it is {kind}. Save the weights as"
                " dense floating-point numbers; quantised ones have to be dequantised with their scales first."
            )


def check_precision(trainer: Trainer) -> None:
    """Raise a ValueError unless a trainer leaves weights in float32, in which victims decide; also mixed with shorter numbers."""
    precision = trainer.precision
    if precision not in _PRECISIONS:
        raise ValueError(
            f"Expected the trainer's `precision` to be one of {list(_PRECISIONS)}, but got {precision!r}: weights are kept, and"
            " victims decide, in float32. For speed use 'bf16-mixed'."
        )


def check_data(data: ImageDataModule, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise a ValueError unless a data set has the images and classes that a module was made for."""
    if tuple(data.image_shape) != image_shape or data.num_classes != num_classes:
        raise ValueError(
            f"Expected data with images of shape {image_shape} and {num_classes} classes, but {data.name} has"
            f" {tuple(data.image_shape)} and {data.num_classes}. Set the module's `image_shape` and `num_classes`, and"
            " the network's, to the data's."
        )


def check_network(network: FeatureNetwork, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise a ValueError unless a network gives images of this shape one score a class and each layer's features.

    Leaves the network as it was.
    """
    check_defaults()  # which a network of one's own may have changed as it was made
    try:
        # In training mode, batch norm would count this image or refuse a single one.
        with kept_modes(network), torch.no_grad():
            logits, _ = network.eval().logits_and_features(torch.zeros(1, *image_shape))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a network for images of shape {image_shape}, but it fails on one: {error}. Set `image_shape` to"
            " the network's, or choose another network."
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"Expected the network to give logits of shape (B, {num_classes}), but got a {type(logits).__name__}. Let its `forward`"
            " return the logits alone."
        )
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"Expected the network to give logits of shape (B, {num_classes}), but got {tuple(logits.shape)}. Set"
            " `num_classes` of the module and of the network to the data's."
        )


def check_on_data(network: FeatureNetwork, data: ImageDataModule) -> None:
    """Raise a ValueError unless a network is a function of the image, by a few training images (`check_function`)."""
    split = data.split("train")
    positions = torch.linspace(0, len(split) - 1, min(ASKED, len(split))).long()
    images = split.__getitems__(positions.tolist()).images.to(device_of(network))
    weight = next(network.parameters(), images)
    check_function(network, images.to(weight.dtype) if weight.is_floating_point() else images)


def check_loss(loss: torch.Tensor) -> None:
    """Raise a ValueError unless a training loss is finite."""
    if not torch.isfinite(loss):
        raise ValueError(
            f"Expected a finite training loss, but got {loss.item()}. Lower the learning rate, and check the images and"
            " the initial weights for NaN or infinity."
        )
