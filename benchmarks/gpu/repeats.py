"""Whether attacks give the same adversarials again, bit for bit, and features those of a CPU."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.gpu.bim import PRECISIONS
from benchmarks.gpu.clock import Record, guarded, measured
from benchmarks.gpu.networks import Attacked, attacked
from benchmarks.gpu.sizes import Sizes
from lightning_advknn.attacks import bim, fgsm, minimum_norm
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import perturb
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import FeatureNetwork

_LAYERS = ("relu1", "relu2", "relu3", "logits")
_TOLERANCE = 1e-5  # of features, relative to their lengths: rounding in float32


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record for each attack, run twice, and for the features of each layer."""
    made = attacked(device, sizes, root)
    steps = min(sizes.steps, 40)
    several = {"fgsm": partial(fgsm, eps=0.25), "bim": partial(bim, eps=0.25, step_size=0.01, steps=steps)}
    for name, attack in several.items():
        for precision in PRECISIONS:
            run = partial(perturb, attack, made.network, made.images, made.labels, precision)
            yield guarded(f"{name} twice in {precision}", report.OURS, partial(_twice, run, device))
    yield guarded(f"minimum_norm twice on {sizes.few} images", report.OURS, partial(_on_victim, made, sizes))
    for layer in _LAYERS:
        yield guarded(f"features of {layer}", report.OURS, partial(_features, made, sizes, layer))


def _twice(run: Callable[[], Tensor], device: torch.device) -> Record:
    first = run()
    second, times = measured(run, device, 1, warm=False)
    return {**times, "exact": torch.equal(first, second), "repeated": torch.equal(first, second)}


def _on_victim(made: Attacked, sizes: Sizes) -> Record:
    """The strongest attack, on a DkNN of all layers, with few steps."""
    rows, device = min(sizes.rows, 10_000), made.images.device
    victim = DkNN(made.network, layers=list(_LAYERS), k=sizes.k, device=str(device))
    victim.fit(made.train_images[:rows].cpu(), made.train_labels[:rows].cpu())
    surrogate = made.network  # any module with logits
    attack = partial(minimum_norm, surrogate=surrogate, surrogate_steps=5, steps=5, neighbours=2 * sizes.k)
    return _twice(
        partial(perturb, attack, victim, made.images[: sizes.few], made.labels[: sizes.few]), device
    )


@torch.no_grad()
@float32_arithmetic()
def _features(made: Attacked, sizes: Sizes, layer: str) -> Record:
    """The largest difference of a feature vector from a CPU's in float64, and from that in another batch."""
    images = made.images[: sizes.few]
    network = FeatureNetwork(made.network, [layer]).eval()
    found, half = (
        network.features(images[:n])[layer].double().cpu() for n in (len(images), len(images) // 2)
    )
    right = images.cpu().double()
    for name, module in deepcopy(made.network).cpu().double().named_children():
        right = module(right)
        if name == layer:
            break
    right = right.flatten(1)
    lengths = right.norm(dim=1)
    largest = ((found - right).norm(dim=1) / lengths).max().item()
    apart = ((found[: len(half)] - half).norm(dim=1) / lengths[: len(half)]).max().item()
    return {"largest": max(largest, apart), "exact": max(largest, apart) < _TOLERANCE}
