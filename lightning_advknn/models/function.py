"""Whether a network is a function of the image."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_advknn.integrity import Snapshot
from lightning_advknn.models.features import FeatureNetwork
from lightning_advknn.models.frozen import kept_modes

ASKED = 4
"""Images that `check_function` asks about."""

# What rounding may differ by, of the largest output: batches of another size add up in another order. That
# comes to some 2e-6 in deep float32 networks on a CPU, to 1e-4 in convolutions with fewer multiplications
# (`winograd`), and to 1e-3 on a GPU's tensor cores (TF32); batch statistics make differences of 1e-2 to 1.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_TF32 = 2e-3

_Outputs = dict[str, Tensor]


@torch.no_grad()
def check_function(network: FeatureNetwork, images: Tensor) -> None:
    """Raise a ValueError unless logits and features of an image depend on that image alone.

    Asks about a few images twice, in another order, and one by one. Asked twice, equal is equal to the bit on
    a CPU; between batches, and on a GPU, up to rounding in the coarsest precision that the network computes
    in. Leaves the network, its modes and all random states as they were.

    Args:
        network: With the layers that count.
        images: A few real ones, float ``(B, channels, H, W)`` in [0, 1], on the network's device.

    Raises:
        ValueError: If outputs are random or depend on the batch or on earlier images, or if the network
            changes its own parameters or buffers when it is asked.
    """
    if len(images) == 1:
        images = torch.cat([images, 1 - images])
    with kept_modes(network), _kept_random_states():
        network.eval()
        snapshot = Snapshot({"": network.network})
        try:
            _check(network, images, snapshot)
        finally:
            snapshot.restore()


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters and buffers are; the CPU, if it has none."""
    return next(chain(network.parameters(), network.buffers()), torch.empty(0)).device


def _check(network: FeatureNetwork, images: Tensor, snapshot: Snapshot) -> None:
    first, tolerance = _first(network, images)
    random_states = _random_states()
    again = _ask(network, images)
    drawn = _random_states() != random_states
    exact = images.device.type == "cpu"
    difference = _difference(first, again, 0.0 if exact else tolerance)
    if drawn:
        raise ValueError(
            "Expected a network that gives the same outputs for the same images, but it draws random numbers when it is asked in"
            f" evaluation mode{f', and asked twice {difference}' if difference else ''}. The usual reason is `F.dropout(x)`"
            " without `training=self.training`; so is noise that `eval()` does not switch off."
        )
    changed = snapshot.changes()
    if changed:
        raise ValueError(
            f"Expected a network that stays as it is when it is asked, but in evaluation mode it changed {', '.join(changed[:3])}."
            " The usual reason is `F.batch_norm(..., training=True)`: pass `training=self.training`, and count nothing in"
            " buffers."
        )
    if difference:
        raise ValueError(
            f"Expected a network that gives the same outputs for the same images, but asked twice {difference}. It draws from a"
            " random generator of its own, or what it gives depends on what it was asked before: switch that off in evaluation mode."
        )
    _check_batches(network, images, first, tolerance)


def _check_batches(network: FeatureNetwork, images: Tensor, first: _Outputs, tolerance: float) -> None:
    try:
        alone = [_ask(network, image) for image in torch.split(images, 1)]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Expected a network that takes a single image, but it takes {len(images)} and fails on one: {error}."
            f" {_why_batches(network)}"
        ) from error
    joined = {name: torch.cat([each[name] for each in alone]) for name in first}
    turned = {name: outputs.flip(0) for name, outputs in _ask(network, images.flip(0)).items()}
    for outputs, how in ((joined, "alone and in a batch"), (turned, "in batches of another order")):
        if difference := _difference(first, outputs, tolerance):
            raise ValueError(
                f"Expected a network whose outputs for an image do not depend on its batch, but {how} {difference}."
                f" {_why_batches(network)}"
            )


def _why_batches(network: FeatureNetwork) -> str:
    without = [
        name
        for name, module in network.network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if without:
        return (
            f"Layers {without[:3]} have no running statistics and so use those of the batch: set `track_running_stats=True`,"
            " and train again."
        )
    return (
        "The usual reasons are `F.batch_norm` with `training=True` or without running statistics, a mean over the whole batch"
        " instead of over each image, and dynamic quantisation."
    )


def _ask(network: FeatureNetwork, images: Tensor) -> _Outputs:
    logits, features = network.logits_and_features(images)
    outputs = {f"features of {layer}": rows for layer, rows in features.items()}
    # Without a head it may give anything.
    return {"logits": logits, **outputs} if isinstance(logits, Tensor) else outputs


def _first(network: FeatureNetwork, images: Tensor) -> tuple[_Outputs, float]:
    """Outputs, and the tolerance of the coarsest precision among weights and what layers give."""
    seen = {tensor.dtype for tensor in chain(network.parameters(), network.buffers())}

    def see(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            seen.add(output.dtype)

    handles = [module.register_forward_hook(see) for module in network.network.modules()]
    try:
        outputs = _ask(network, images)
    finally:
        for handle in handles:
            handle.remove()
    known = [_ROUNDING[dtype] for dtype in seen if dtype in _ROUNDING]
    tolerance = max(known, default=_ROUNDING[torch.float32])
    return outputs, tolerance if images.device.type == "cpu" else max(tolerance, _TF32)


def _difference(first: _Outputs, other: _Outputs, tolerance: float) -> str:
    """The first outputs that differ by more than a share of the largest, in words; nothing if none do."""
    for name, outputs in first.items():
        left, right = outputs.double().flatten(1), other[name].double().flatten(1)
        largest = left.abs().max().item() if left.numel() else 0.0
        if not np.isfinite(largest):
            continue  # which is refused where outputs are used
        gaps = (left - right).abs().nan_to_num(torch.inf).amax(1) if left.numel() else left.new_zeros(1)
        if gaps.max().item() > tolerance * largest:
            image = int(gaps.argmax())
            return f"the {name} of image {image} differ by {gaps[image].item():.3g} (the largest is {largest:.3g})"
    return ""


def _random_states() -> list[object]:
    """Of all global generators."""
    generators = [torch.get_rng_state()]
    if torch.cuda.is_available():
        generators += torch.cuda.get_rng_state_all()
    kind, numbers, *rest = np.random.get_state()  # noqa: NPY002  # networks may draw from it
    return [
        random.getstate(),
        kind,
        np.asarray(numbers).tobytes(),
        rest,
        *(state.numpy().tobytes() for state in generators),
    ]


@contextmanager
def _kept_random_states() -> Iterator[None]:
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002
