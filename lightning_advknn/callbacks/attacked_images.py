"""Images that a callback attacks, with their victims, rows and metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_advknn.attacks import Attack, Target
from lightning_advknn.choices import GradientPrecision, LabelSource
from lightning_advknn.classifiers import DkNN
from lightning_advknn.evaluation import (
    Rows,
    Verdicts,
    average,
    imitation,
    judge,
    make_rows,
    on_cpu,
    perturb,
    predict,
    summarize,
)
from lightning_advknn.functional import float32_arithmetic, knn_prediction
from lightning_advknn.models import kept_modes
from lightning_advknn.modules import SurrogateModule

_SEED = 0  # of random attacks
# Sizes that few images are filled up to on a GPU; an attack has the same in all epochs.
_GPU_BATCHES = (64, 256)


@dataclass(frozen=True)
class AttackedImages:
    """Clean images, and the victims and attacks on them.

    Args:
        images: float32 ``(n, channels, H, W)`` in [0, 1].
        labels: True classes, int64 ``(n,)``.
        ids: Image ids, int64 ``(n,)``.
        dknn: The victim.
        layer: Layer of the kNN.
        before: Its verdicts on the clean images.
        surrogate: The surrogate, if attacks go through one.
        label_source: Which label attacks ascend.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    dknn: DkNN
    layer: str
    before: Verdicts
    surrogate: SurrogateModule | None
    label_source: LabelSource

    def attack(self, name: str, target: Target, attack: Attack, precision: GradientPrecision) -> Tensor:
        """Adversarials of `evaluation.perturb`, with a fixed seed."""
        torch.manual_seed(_SEED)
        ascended = self.before.knn if self.label_source == "knn" else self.labels
        batch_size = _batch_size(len(self.images), self.images.device)
        return perturb(attack, target, self.images, ascended, precision, name, batch_size=batch_size)

    def rows(self, adversarial: Tensor | None = None) -> Rows:
        """Rows of `evaluation.make_rows` for adversarials; None stands for the clean images.

        If the surrogate's layer votes, columns ``surrogate_agreement`` and ``surrogate_kl`` of
        `evaluation.imitation` follow.
        """
        after = self.before if adversarial is None else judge(self.dknn, self.layer, adversarial)
        attacked = self.images if adversarial is None else adversarial
        classes = None
        if self.surrogate is not None:
            classes = predict(self.surrogate, self.images), predict(self.surrogate, attacked)
        rows = make_rows(self.ids, self.labels, self.images, attacked, self.before, after, classes)
        layers = self.dknn.layers
        if self.surrogate is not None and self.surrogate.layer in layers:
            votes = after.votes[:, layers.index(self.surrogate.layer)]
            found = imitation(self.surrogate, attacked, votes)
            rows |= {f"surrogate_{name}": column for name, column in found.items()}
        # On the CPU, except that several ranks reduce them where they can exchange them.
        return rows if dist.is_initialized() else on_cpu(rows)

    def metrics(self, name: str, rows: Rows) -> dict[str, float]:
        """Metrics to log for an attack or for ``clean`` images, reduced over all ranks."""
        found = dict(summarize(rows, over_ranks=True))
        if name == "clean":  # without distortions and success, which are an attack's
            found = {key: value for key, value in found.items() if key.endswith(("_acc", "_credibility"))}
        right = knn_prediction(rows["votes_after"]) == rows["label"][:, None]  # (n, L)
        columns = {
            f"layers/{name}/{layer}_knn_acc": right[:, position]
            for position, layer in enumerate(self.dknn.layers)
        }
        columns |= {
            f"surrogate/{name}/{key}": rows[f"surrogate_{key}"]
            for key in ("agreement", "kl")
            if f"surrogate_{key}" in rows
        }
        return {**{f"attack/{name}/{key}": value for key, value in found.items()}, **average(columns)}

    def success(self, name: str, rows: Rows) -> dict[str, float]:
        """Success of an attack on each victim (1 - accuracy), reduced over all ranks."""
        return {
            f"eps/{name}/{key.removesuffix('acc')}success": 1 - value
            for key, value in summarize(rows, over_ranks=True).items()
            if key.endswith("_acc")
        }


def _batch_size(n: int, device: torch.device) -> int | None:
    """Images in a batch: on a GPU a few are not filled up to all that `perturb` attacks at once."""
    return next((size for size in _GPU_BATCHES if n <= size), None) if device.type == "cuda" else None


@contextmanager
def measuring(module: LightningModule) -> Iterator[None]:
    """Use evaluation mode, float32 and gradients, as `attack.py` does; restore modes and random states."""
    with (
        kept_modes(module),
        isolate_rng(),
        float32_arithmetic(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        module.eval()
        yield
