"""BIM on all images: each precision, replayed from a CUDA graph or not, beside torchattacks."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.attacks import gradient_operations
from benchmarks.gpu.clock import Record, counted, guarded, measured
from benchmarks.gpu.networks import Attacked, attacked
from benchmarks.gpu.sizes import Sizes
from lightning_advknn.attacks import bim
from lightning_advknn.attacks.parts import step_graph
from lightning_advknn.choices import GradientPrecision
from lightning_advknn.evaluation import GPU_BATCH, perturb, predict

PRECISIONS: tuple[GradientPrecision, ...] = ("float32", "tf32", "bfloat16")
_EPS, _STEP = 0.25, 0.01

_Attack = Callable[[Tensor, Tensor], Tensor]


def measure(device: torch.device, sizes: Sizes, root: str | None) -> Iterator[Record]:
    """Yield a record for each way to run BIM; ``differing`` counts images unlike those of float32."""
    made = attacked(device, sizes, root)
    n = len(made.images)
    case = f"{made.name}: bim eps={_EPS} step_size={_STEP} steps={sizes.steps}, {n} images"
    first: list[Tensor] = []
    for method, run in _ways(made, sizes).items():
        # torchattacks takes torch's defaults: TF32 in a GPU's convolutions.
        ceiling = next(
            (p for p in PRECISIONS if p in method), "float32" if method.startswith(report.OURS) else "tf32"
        )
        yield guarded(case, method, partial(_attacked, made, run, sizes, first, ceiling))


def _ways(made: Attacked, sizes: Sizes) -> dict[str, _Attack]:
    ways: dict[str, _Attack] = {}
    for precision in PRECISIONS:
        name = report.OURS if precision == "float32" else f"{report.OURS} {precision}"
        ways[name] = partial(_ours, made, sizes, precision, True)
        ways[f"{name}, no graph"] = partial(_ours, made, sizes, precision, False)
    if find_spec("torchattacks"):
        for name, size in (("torchattacks", GPU_BATCH), ("torchattacks, one batch", len(made.images))):
            ways[name] = partial(_theirs, made, sizes, size)
    return ways


def _ours(
    made: Attacked, sizes: Sizes, precision: GradientPrecision, graph: bool, images: Tensor, labels: Tensor
) -> Tensor:
    attack = partial(bim, eps=_EPS, step_size=_STEP, steps=sizes.steps)
    devices: Any = step_graph._DEVICES
    try:
        step_graph._DEVICES = devices if graph else ()  # type: ignore[assignment]
        return perturb(attack, made.network, images, labels, precision)
    finally:
        step_graph._DEVICES = devices


def _theirs(made: Attacked, sizes: Sizes, size: int, images: Tensor, labels: Tensor) -> Tensor:
    import torchattacks

    attack = torchattacks.BIM(made.network, eps=_EPS, alpha=_STEP, steps=sizes.steps)
    parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
    return torch.cat([attack(*part) for part in parts])


def _attacked(made: Attacked, run: _Attack, sizes: Sizes, first: list[Tensor], ceiling: str) -> Record:
    images, labels = made.images, made.labels
    adversarial = run(images, labels)
    first.append(adversarial)  # float32 comes first
    again, times = measured(lambda: run(images, labels), images.device, 2, warm=False)
    before, after = (predict(made.network, each) == labels for each in (images, adversarial))
    one = images[:GPU_BATCH], labels[:GPU_BATCH]
    network = deepcopy(made.network).cpu().requires_grad_(False)
    gradient = gradient_operations(network, images[:1].cpu(), labels[:1].cpu())
    return {
        **times,
        **counted(lambda: run(*one), images.device),
        "repeated": torch.equal(adversarial, again),
        "differing": int(((adversarial - first[0]).abs().flatten(1).amax(1) > 1e-5).sum()),
        "checked": len(images),
        "success": ((before & ~after).sum() / before.sum().clamp(min=1)).item(),
        "attacked_acc": after.float().mean().item(),
        "work": [[gradient * len(images) * sizes.steps, ceiling]],
    }
