"""FGSM and BIM on real test images: python -m benchmarks.attacks [--quick] [--surrogate CHECKPOINT].

Each attack of the experiment ascends true labels through the backbone and, if a checkpoint is given, through
a surrogate. Methods: `evaluation.perturb` at each precision for CPUs, torchattacks and foolbox. The libraries
get batches of the same size, torchattacks also all images at once, each also with autocast to bfloat16; and
weights without gradients, which they would not set themselves.

A method is ``exact`` if its adversarials equal those of torchattacks to 1e-5 in every pixel; ``differing``
counts the other images, and ``largest`` is the largest difference. Where a gradient is zero up to rounding,
its sign is random, and BIM continues from there. Successes show whether that matters: ``success`` is the
share of the images that the attacked network gets right before and wrong after; ``attacked_acc`` is its
accuracy after, ``knn_acc`` that of the victim's kNN. ``limit_share`` is relative to the speed of a bare
float32 matrix product, for the operations of a direct forward and backward pass; faster convolutions can
exceed 1. Each method and network runs in its own process, whose peak memory includes Python, torch and the
data.

Rounds go over all methods, and each measurement is kept in ``runs/benchmarks/attacks`` at once, so that a run
that was stopped goes on where it was, as in `benchmarks.search`.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.blas import used
from benchmarks.features import backbone_run, bank_batches
from benchmarks.kept import Kept, source_digest
from benchmarks.measure import in_child, summarized, timed
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.attacks.gradient_sign import loss_and_gradient
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import CPU_BATCH, perturb, predict
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import BankSettings, build_banks
from lightning_advknn.storage import digest, versions

THEIRS = "torchattacks"
_FURTHER = ("limit_share", "success", "attacked_acc", "knn_acc", "largest", "differing", "blas")
_SIZE = 2048  # rows and columns of the bare matrix product
_SOURCES = ("attacks/**/*.py", "models/*.py", "functional/*.py", "convolutions.py", "evaluation.py")
METHODS = {
    report.OURS: "float32",
    f"{report.OURS} winograd": "winograd",
    f"{report.OURS} bfloat16": "bfloat16",
    **{
        f"{THEIRS}{precision}{batch}": THEIRS
        for precision in ("", " bfloat16")
        for batch in ("", ", one batch")
    },
    "foolbox": "foolbox",
}
"""Methods, each with a precision or a library."""


def main(args: Sequence[str] | None = None) -> list[report.Record]:
    """Run the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--surrogate", help="Checkpoint of a trained surrogate, to attack through it too.")
    parser.add_argument("--images", type=int, help=f"Number of images; 1000, or {CPU_BATCH} if quick.")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Only these, and torchattacks."
    )
    parser.add_argument("--repeats", type=int, default=3, help="Number of rounds.")
    given = report.parse(parser, args)
    experiment = [given.config, given.root, given.backbone, given.surrogate]
    run = backbone_run(report.experiment(*experiment))
    _ = run.networks.backbone()  # trains it now, if necessary
    n = min(given.images or (CPU_BATCH if given.quick else 1000), len(run.test))
    sources = source_digest(*(f"lightning_advknn/{each}" for each in _SOURCES))
    settings: dict[str, Any] = {"experiment": run.describe(), "images": n}
    key = digest([settings, given.surrogate, sources, given.threads, report.device(), versions()])
    bench = _Bench(run, given, n, Path("runs/benchmarks/attacks") / key)
    settings["float32_gflops"] = round(bench.speed / 1e9, 1)
    for _ in bench.measured(experiment):
        report.write("attacks", report.with_ratios(bench.records()), given, settings, *_FURTHER)
    records = report.with_ratios(bench.records())
    report.publish("attacks", records, given, settings, *_FURTHER)
    return records


class _Bench:
    """Measurements of one run: times and accuracies in a file, adversarials beside it."""

    def __init__(self, run: ExperimentRun, given: argparse.Namespace, n: int, folder: Path) -> None:
        self.run, self.given, self.n, self.folder = run, given, n, folder
        self.kept = Kept(folder / "measured.jsonl")
        self.speed = _matmul_speed()
        victim = run.experiment.victim
        network = FeatureNetwork(run.networks.backbone().network, [victim.layer]).eval()
        banks = build_banks(
            network, bank_batches(run, None), run.data.num_classes, BankSettings(victim.metric)
        )
        self.knn = DkNN.on_banks(network, banks, victim.k)
        self.images, self.labels, _ = run.test.__getitems__(range(n))
        self.work = {
            through: n
            * gradient_operations(
                run.networks.logits_fn(through).requires_grad_(False), self.images[:1], self.labels[:1]
            )
            for through in run.methods
        }

    def measured(self, experiment: Sequence[Any]) -> Iterator[None]:
        """Measure what is missing, each method and network in its own process; stop after each."""
        methods = [method for method in METHODS if method in (*self.given.methods, THEIRS)]
        for turn in range(self.given.repeats):
            for through in self.run.methods:
                for method in methods:
                    if not self.kept.having(through=through, method=method, turn=turn):
                        self._measure(experiment, through, method, turn)
                        yield

    def _measure(self, experiment: Sequence[Any], through: str, method: str, turn: int) -> None:
        file = self._file(through, method)
        file.parent.mkdir(parents=True, exist_ok=True)
        times = in_child(
            "benchmarks.attacks",
            "attack",
            self.given.threads,
            experiment=experiment,
            through=through,
            method=method,
            n=self.n,
            file=str(file.absolute()),
        )
        blas = times.pop("blas")
        logits_fn = self.run.networks.logits_fn(through)
        right = predict(logits_fn, self.images) == self.labels
        for name, adversarial in load_file(file).items():
            after = predict(logits_fn, adversarial) == self.labels
            self.kept.add(
                through=through,
                method=method,
                turn=turn,
                attack=name,
                blas=blas,
                **times[name],
                success=((right & ~after).sum() / right.sum().clamp(min=1)).item(),
                attacked_acc=after.float().mean().item(),
                knn_acc=(self.knn.predict(adversarial) == self.labels).float().mean().item(),
            )

    def records(self) -> list[report.Record]:
        """A record for each network, attack and method that has been measured."""
        label = f"{'quick, ' if self.given.quick else ''}{self.run.data.name}"
        records = []
        for through in self.run.methods:
            theirs = self._adversarials(through, THEIRS)
            for name, settings in self.run.experiment.attacks.items():
                shown = " ".join(f"{key}={value}" for key, value in settings.settings.items())
                gradients = int(settings.settings.get("steps", 1))
                for method in METHODS:
                    lines = self.kept.having(through=through, method=method, attack=name)
                    if not lines:
                        continue
                    same = {key: lines[-1][key] for key in ("success", "attacked_acc", "knn_acc", "blas")}
                    record = {
                        "case": f"{label}: {name} {shown} through {through}, {self.n} images",
                        "method": method,
                        **summarized([line["seconds"] for line in lines]),
                        "peak_mib": max(line["peak_mib"] for line in lines),
                        **same,
                    }
                    record["limit_share"] = gradients * self.work[through] / record["seconds"] / self.speed
                    if theirs:
                        made = self._adversarials(through, method)[name]
                        apart = (made - theirs[name]).abs().flatten(1).amax(1)
                        record["exact"] = bool(apart.max() <= 1e-5)
                        record["differing"] = int((apart > 1e-5).sum())
                        record["largest"] = apart.max().item()
                    records.append(record)
        return records

    def _adversarials(self, through: str, method: str) -> dict[str, Tensor]:
        file = self._file(through, method)
        return load_file(file) if file.is_file() else {}

    def _file(self, through: str, method: str) -> Path:
        return self.folder / f"{through}-{method.replace(' ', '_').replace(',', '')}.safetensors"


def attack(experiment: Sequence[Any], through: str, method: str, n: int, file: str) -> dict[str, Any]:
    """Time one method's attacks through one network in this process, each once.

    Args:
        experiment: Arguments of `report.experiment`.
        through: One of the run's methods.
        method: One of `METHODS`.
        n: Number of test images.
        file: File to write the adversarials to, by attack.

    Returns:
        By attack, ``seconds`` and ``peak_mib`` so far; and ``blas``.
    """
    run, kind = backbone_run(report.experiment(*experiment)), METHODS[method]
    logits_fn = run.networks.logits_fn(through).requires_grad_(False)
    images, labels, _ = run.test.__getitems__(range(n))
    size = n if "one batch" in method else CPU_BATCH

    def bound(settings: AttackSettings) -> Callable[[], Tensor]:
        if kind in _PEERS:
            target = _Autocast(logits_fn) if "bfloat16" in method else logits_fn
            return partial(_batches, _PEERS[kind](target, settings), images, labels, size)
        precision: Any = kind
        return partial(perturb, settings.bind(), logits_fn, images, labels, precision)

    bound(AttackSettings("fgsm", {"eps": 0.1}))()  # what the first call alone does
    times: dict[str, Any] = {}
    found = {}
    for name, settings in run.experiment.attacks.items():
        made, time = timed(bound(settings))
        times[name] = {key: time[key] for key in ("seconds", "peak_mib")}
        found[name] = made.detach().contiguous()
    save_file(found, file)
    return {**times, "blas": used(method)}


class _Autocast(nn.Module):
    """A network in bfloat16 where autocast allows it, with logits in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, C)``."""
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


def _batches(theirs: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, size: int) -> Tensor:
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


def gradient_operations(logits_fn: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Floating-point operations of one gradient of some images, without those for weights."""
    counter = FlopCounterMode(display=False)
    with counter:
        # Not the leaf itself, which the counter's hooks refuse.
        loss_and_gradient(lambda leaf: logits_fn(leaf + 0), images, labels)
    return counter.get_total_flops()


def _matmul_speed() -> float:
    """Floating-point operations a second of a large float32 matrix product; the best of several."""
    left, right = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    seconds = [timed(lambda: left @ right)[1]["seconds"] for _ in range(8)]
    return 2 * _SIZE**3 / min(seconds)


if __name__ == "__main__":
    main()
