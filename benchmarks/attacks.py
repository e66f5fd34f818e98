"""FGSM and BIM on real test images: python -m benchmarks.attacks [--quick] [--surrogate CHECKPOINT].

Each attack of the experiment ascends true labels through the backbone and, if a checkpoint is given, through
a surrogate. Methods: `evaluation.perturb` at each precision, torchattacks and foolbox. The libraries get
batches of the same size, torchattacks also all images at once, and weights without gradients, which they
would not set themselves.

A method is ``exact`` if its adversarials equal those of torchattacks to 1e-5 in every pixel; ``differing``
counts the other images, and ``largest`` is the largest difference. Where a gradient is zero up to rounding,
its sign is random, and BIM continues from there. The accuracies under attack show whether that matters:
``attacked_acc`` of the attacked network, and ``knn_acc`` of the victim's kNN. ``limit_share`` is relative to
the speed of a bare float32 matrix product, for the operations of a direct forward and backward pass; faster
convolutions can exceed 1. Each method and network runs in its own process, whose peak memory includes Python,
torch and the data.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.features import backbone_run, bank_batches
from benchmarks.measure import in_child, timed
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.attacks.gradient_sign import loss_and_gradient
from lightning_advknn.choices import GradientPrecision
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import CPU_BATCH, perturb, predict
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import BankSettings, build_banks

_FURTHER = ("limit_share", "attacked_acc", "knn_acc", "largest", "differing")
_SIZE = 2048  # rows and columns of the bare matrix product
_METHODS = {
    **{report.OURS if p == "float32" else f"{report.OURS} {p}": p for p in get_args(GradientPrecision)},
    "torchattacks": "torchattacks",
    "torchattacks, one batch": "torchattacks",
    "foolbox": "foolbox",
}

_Made = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""Times and adversarials by attack, of each method."""


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--surrogate", help="Checkpoint of a trained surrogate, to attack through it too.")
    parser.add_argument("--images", type=int, help=f"Number of images; 1000, or {CPU_BATCH} if quick.")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, help="Only these, and torchattacks.")
    given = report.parse(parser, args)
    n = given.images or (CPU_BATCH if given.quick else 1000)
    experiment = [given.config, given.root, given.backbone, given.surrogate]
    run = backbone_run(report.experiment(*experiment))
    _ = run.networks.backbone()  # trains it now, if necessary
    victim = run.experiment.victim
    network = FeatureNetwork(run.networks.backbone().network, [victim.layer]).eval()
    banks = build_banks(network, bank_batches(run, None), run.data.num_classes, BankSettings(victim.metric))
    knn = DkNN.on_banks(network, banks, victim.k)
    n, speed = min(n, len(run.test)), _matmul_speed()
    label = f"{'quick, ' if given.quick else ''}{run.data.name}"
    records: list[report.Record] = []
    for through in run.methods:
        made = _run_methods(given, experiment, through, n)
        records += _compare(run, through, made, knn, n, speed, label)
    records = report.with_ratios(records)
    measured = {"experiment": run.describe(), "images": n, "float32_gflops": round(speed / 1e9, 1)}
    report.publish("attacks", records, given, measured, *_FURTHER)
    return records


def _run_methods(given: argparse.Namespace, experiment: Sequence[Any], through: str, n: int) -> _Made:
    """Times and adversarials of all methods through one network, each in its own process."""
    made: _Made = {}
    for method, kind in _METHODS.items():
        if given.methods and method not in (*given.methods, "torchattacks"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adversarial.safetensors"
            arguments = {
                "experiment": experiment,
                "through": through,
                "kind": kind,
                "n": n,
                "size": n if "one batch" in method else CPU_BATCH,
                "file": str(file),
            }
            times = in_child("benchmarks.attacks", "attack", given.threads, **arguments)
            made[method] = times, load_file(file)
    return made


def _compare(
    run: ExperimentRun, through: str, made: _Made, knn: DkNN, n: int, speed: float, label: str
) -> Iterator[report.Record]:
    """A record for each attack and method."""
    logits_fn, work, labels = run.networks.logits_fn(through), _work(run, through, n), run.test.labels[:n]
    for name, settings in run.experiment.attacks.items():
        shown = " ".join(f"{key}={value}" for key, value in settings.settings.items())
        gradients = int(settings.settings.get("steps", 1))
        for method, (times, adversarials) in made.items():
            adversarial, theirs = adversarials[name], made["torchattacks"][1][name]
            apart = (adversarial - theirs).abs().flatten(1).amax(1)
            yield {
                "case": f"{label}: {name} {shown} through {through}, {n} images",
                "method": method,
                **times[name],
                "exact": bool(apart.max() <= 1e-5),
                "differing": int((apart > 1e-5).sum()),
                "largest": apart.max().item(),
                "attacked_acc": (predict(logits_fn, adversarial) == labels).float().mean().item(),
                "knn_acc": (knn.predict(adversarial) == labels).float().mean().item(),
                "limit_share": gradients * work / times[name]["seconds"] / speed,
            }


def attack(
    experiment: Sequence[Any], through: str, kind: Any, n: int, size: int, file: str
) -> dict[str, Any]:
    """Time one method's attacks through one network in this process.

    Args:
        experiment: Arguments of `report.experiment`.
        through: One of the run's methods.
        kind: One of the precisions, or a library.
        n: Number of test images.
        size: Images that a library gets at once.
        file: File to write the adversarials to, by attack.
    """
    run = backbone_run(report.experiment(*experiment))
    logits_fn = run.networks.logits_fn(through).requires_grad_(False)
    images, labels, _ = run.test.__getitems__(range(n))
    times, found = {}, {}
    for name, settings in run.experiment.attacks.items():
        if kind in _PEERS:
            theirs = _PEERS[kind](logits_fn, settings)
            run_attack = partial(_batches, theirs, images, labels, size)
        else:
            run_attack = partial(perturb, settings.bind(), logits_fn, images, labels, kind)
        made, times[name] = timed(run_attack, 3)
        found[name] = made.detach().contiguous()
    save_file(found, file)
    return times


def _batches(
    theirs: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, size: int
) -> Tensor:
    batches = zip(torch.split(images, size), torch.split(labels, size), strict=True)
    return torch.cat([theirs(*batch) for batch in batches])


def _torchattacks(logits_fn: nn.Module, settings: AttackSettings) -> Any:
    import torchattacks

    kept = settings.settings
    if settings.function == "fgsm":
        return torchattacks.FGSM(logits_fn, eps=kept["eps"])
    return torchattacks.BIM(logits_fn, eps=kept["eps"], alpha=kept["step_size"], steps=int(kept["steps"]))


def _foolbox(logits_fn: nn.Module, settings: AttackSettings) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports a name that SciPy has moved
        import foolbox
    kept = settings.settings
    attack: Any = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    if settings.function == "bim":
        attack = foolbox.attacks.LinfBasicIterativeAttack(
            abs_stepsize=kept["step_size"], steps=int(kept["steps"]), random_start=False
        )
    model = foolbox.PyTorchModel(logits_fn, bounds=(0, 1), device="cpu")
    # It returns adversarials before and after clipping, and where they succeed.
    return lambda images, labels: attack(model, images, labels, epsilons=kept["eps"])[1]


_PEERS = {"torchattacks": _torchattacks, "foolbox": _foolbox}


def _work(run: ExperimentRun, through: str, n: int) -> float:
    """Floating-point operations of one gradient of n images, without those for weights."""
    images, labels, _ = run.test.__getitems__([0])
    logits_fn = run.networks.logits_fn(through).requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        # Not the leaf itself, which the counter's hooks refuse.
        loss_and_gradient(lambda leaf: logits_fn(leaf + 0), images, labels)
    return float(counter.get_total_flops() * n)


def _matmul_speed() -> float:
    """Floating-point operations a second of a large float32 matrix product; the best of several."""
    left, right = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    seconds = [timed(lambda: left @ right)[1]["seconds"] for _ in range(8)]
    return 2 * _SIZE**3 / min(seconds)


if __name__ == "__main__":
    main()
