"""A check that a network's outputs for an image depend on that image alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.integrity import Snapshot
from lightning_advknn.models.features import FeatureNetwork
from lightning_advknn.models.frozen import kept_modes

ASKED = 4
"""Number of images that `check_function` needs."""

# Tolerances for rounding, relative to the largest output: another batch size changes the order of sums. Such
# differences are about 2e-6 in deep float32 networks on a CPU, and 1e-4 where convolutions are computed by
# Winograd's algorithm, as cuDNN may. Batch statistics make differences of 1e-2 to 1.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

_Outputs = dict[str, Tensor]


@torch.no_grad()
@float32_arithmetic()
def check_function(network: FeatureNetwork, images: Tensor) -> None:
    """Raise a ValueError unless logits and features of an image depend on that image alone.

    Runs the network on the images twice, then in reverse order, then one by one. On a CPU the first two runs
    must agree bit for bit; all others must agree up to rounding in the network's coarsest precision. Restores
    the network, its modes and all random states.

    Args:
        network: The network and the layers to check.
        images: Some real images, float ``(B, channels, H, W)`` in [0, 1], on the network's device.

    Raises:
        ValueError: If outputs are random, depend on the batch or on earlier images, or if a forward pass
            changes the network's parameters or buffers.
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
    """Device of a network's parameters and buffers; the CPU if it has none."""
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
            "Expected a network that gives the same outputs for the same images, but it draws random numbers"
            f" in evaluation mode{f', and asked twice {difference}' if difference else ''}. Usual reasons are"
            " `F.dropout(x)` without `training=self.training`, and noise that `eval()` does not switch off."
        )
    changed = snapshot.changes()
    if changed:
        raise ValueError(
            "Expected a forward pass to leave the network unchanged, but in evaluation mode it changed"
            f" {', '.join(changed[:3])}. The usual reason is `F.batch_norm(..., training=True)`: pass"
            " `training=self.training`, and keep no counts in buffers."
        )
    if difference:
        raise ValueError(
            "Expected a network that gives the same outputs for the same images, but asked twice"
            f" {difference}. It uses a random generator of its own, or its output depends on what it was"
            " asked before: switch that off in evaluation mode."
        )
    _check_batches(network, images, first, tolerance)


def _check_batches(network: FeatureNetwork, images: Tensor, first: _Outputs, tolerance: float) -> None:
    try:
        alone = [_ask(network, image) for image in torch.split(images, 1)]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Expected a network that takes a single image, but it takes {len(images)} and fails on one:"
            f" {error}. {_why_batches(network)}"
        ) from error
    joined = {name: torch.cat([each[name] for each in alone]) for name in first}
    reverse = {name: outputs.flip(0) for name, outputs in _ask(network, images.flip(0)).items()}
    for outputs, how in ((joined, "alone and in a batch"), (reverse, "in batches of another order")):
        if difference := _difference(first, outputs, tolerance):
            raise ValueError(
                f"Expected a network whose outputs for an image do not depend on its batch, but {how}"
                f" {difference}. {_why_batches(network)}"
            )


def _why_batches(network: FeatureNetwork) -> str:
    """Probable reasons why outputs depend on the batch."""
    without = [
        name
        for name, module in network.network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if without:
        return (
            f"Layers {without[:3]} have no running statistics and so use the batch's: set"
            " `track_running_stats=True` and train again."
        )
    return (
        "Usual reasons are `F.batch_norm` with `training=True` or without running statistics, a mean over"
        " the whole batch instead of over each image, and dynamic quantisation."
    )


def _ask(network: FeatureNetwork, images: Tensor) -> _Outputs:
    logits, features = network.logits_and_features(images)
    outputs = {f"features of {layer}": rows for layer, rows in features.items()}
    # A network without a head may return anything.
    return {"logits": logits, **outputs} if isinstance(logits, Tensor) else outputs


def _first(network: FeatureNetwork, images: Tensor) -> tuple[_Outputs, float]:
    """Outputs of a first run, and the tolerance for the coarsest precision of weights and layer outputs."""
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
    return outputs, max(known, default=_ROUNDING[torch.float32])


def _difference(first: _Outputs, other: _Outputs, tolerance: float) -> str:
    """Describe the first outputs that differ by more than the tolerance; "" if none do."""
    for name, outputs in first.items():
        left, right = outputs.double().flatten(1), other[name].double().flatten(1)
        largest = left.abs().max().item() if left.numel() else 0.0
        if not np.isfinite(largest):
            continue  # NaN and infinity are refused where outputs are used
        gaps = (left - right).abs().nan_to_num(torch.inf).amax(1) if left.numel() else left.new_zeros(1)
        if gaps.max().item() > tolerance * largest:
            image = int(gaps.argmax())
            gap = gaps[image].item()
            return f"the {name} of image {image} differ by {gap:.3g} (the largest is {largest:.3g})"
    return ""


def _random_states() -> list[object]:
    """States of all global random generators."""
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
    """Restore the states of all global random generators on exit."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002
