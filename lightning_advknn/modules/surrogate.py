"""Training of DkNNB: consistency learning (Eq. 13, 15, 16)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_advknn import functional
from lightning_advknn.choices import Backend, Metric, whole
from lightning_advknn.data import Batch, ImageDataModule, data_of
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import DkNNB, Surrogate
from lightning_advknn.modules.backbone import BackboneModule
from lightning_advknn.modules.checkpoint import IDENTITY, Identity, check_identity, describe
from lightning_advknn.modules.checks import LossCheck, check_data, check_on_data, check_precision, log_loss
from lightning_advknn.modules.weights import load_weights
from lightning_advknn.search import (
    APPROXIMATE,
    MemoryBank,
    check_backend,
    index_settings,
    recall,
)
from lightning_advknn.search.build import BankSettings, build_banks
from lightning_advknn.search.recall import RECALL_QUERIES
from lightning_advknn.storage import (
    weights_digest,
)


class _Targets(NamedTuple):
    """What the surrogate learns from in one split, in order of image id."""

    ids: Tensor
    """int64 ``(n,)``, ascending."""
    features: Tensor
    """Raw features of the layer, float32 ``(n, D)``."""
    votes: Tensor
    """kNN votes, int64 ``(n, C)``; leave-one-out for training images."""
    distribution: Tensor
    """p(x) of the votes, float32 ``(n, C)``."""
    classes: Tensor
    """The kNN's predictions, int64 ``(n,)``."""


class SurrogateModule(LightningModule):
    """DkNNB on one layer of a frozen backbone, trained to imitate the kNN on that layer.

    Features and votes do not change over epochs, so both are computed once, before the first; of several
    ranks, each computes its part of both, and all get all. Logs ``train/loss`` and, for val and
    test, ``loss``, ``kl`` (Eq. 15), ``agreement`` with the kNN's prediction and ``acc`` on true labels.

    Args:
        network: The backbone's architecture.
        backbone_checkpoint: Its trained weights, written by `BackboneModule`.
        layer: Layer that the kNN searches and DkNNB reads.
        image_shape: Channels, height, width.
        num_classes: C.
        k: Neighbours that vote.
        metric: The kNN's distance.
        backend: What scans the bank. Of an approximate one, ``recall`` is logged too: the share of true
            neighbours that it finds of the split's first images.
        cls_weight: lambda of Eq. (16); .3 in the paper.
        cl_weight: Weight of L_CL; 0 gives the paper's ablation with L_CLS alone.
        learning_rate: Of Adam.
        index: Settings of an approximate backend that differ from its defaults, as `search.index_settings`.

    Raises:
        ValueError: If the layer does not exist or both weights are 0.
    """

    def __init__(
        self,
        network: nn.Module,
        backbone_checkpoint: str,
        layer: str = "relu3",
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        k: int = 75,
        metric: Metric = "cosine",
        backend: Backend = "auto",
        cls_weight: float = 0.3,
        cl_weight: float = 1.0,
        learning_rate: float = 1e-3,
        index: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if min(cls_weight, cl_weight) < 0 or cls_weight + cl_weight == 0:
            raise ValueError(
                "Expected `cls_weight` and `cl_weight` to be at least 0 and not both 0, but got"
                f" {cls_weight} and {cl_weight}."
            )
        # Python's own numbers: a checkpoint that holds NumPy's does not load without running code.
        image_shape = [whole("image_shape", size) for size in image_shape]
        num_classes, k = whole("num_classes", num_classes), whole("k", k)
        cls_weight, cl_weight, learning_rate = float(cls_weight), float(cl_weight), float(learning_rate)
        self.save_hyperparameters(
            {
                "layer": layer,
                "image_shape": image_shape,
                "num_classes": num_classes,
                "k": k,
                "metric": metric,
                "backend": backend,
                "cls_weight": cls_weight,
                "cl_weight": cl_weight,
                "learning_rate": learning_rate,
                "index": index,
            }
        )
        backbone = BackboneModule(network, [layer], image_shape, num_classes)
        with torch.no_grad():
            width = backbone.network.eval().features(torch.zeros(1, *image_shape))[layer].shape[1]
        self.surrogate = Surrogate(network, layer, DkNNB(width, num_classes))
        self.surrogate.backbone.requires_grad_(False)
        self.backbone_checkpoint = Path(backbone_checkpoint)
        self.layer = layer
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.k = k
        self.metric: Metric = metric
        self.backend: Backend = backend
        self.index = index
        self.cls_weight, self.cl_weight = cls_weight, cl_weight
        self.learning_rate = learning_rate
        self._losses = LossCheck()
        self.scores = nn.ModuleDict(
            {
                f"{stage}_scores": MetricCollection(
                    {name: MeanMetric() for name in ("loss", "kl", "agreement", "acc")},
                    prefix=f"{stage}/",
                )
                for stage in ("val", "test")
            }
        )
        self._bank: MemoryBank | None = None
        self._targets: dict[str, _Targets] = {}
        self._votes_given: dict[str, Tensor] = {}
        self._features_given: dict[str, Tensor] = {}
        self._recall: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of q(x), ``(B, C)``, for images in [0, 1]."""
        logits: Tensor = self.surrogate(images)
        return logits

    def identity(self, data_name: str) -> Identity:
        """What a checkpoint of this module says of itself."""
        return {
            "kind": "surrogate",
            "network": describe(self.surrogate.backbone.network),
            "data": data_name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "layer": self.layer,
            "k": self.k,
            "metric": self.metric,
            **({"backend": f"{self.backend} {self.index or {}}"} if self.backend in APPROXIMATE else {}),
            "backbone": weights_digest(self.surrogate.backbone),
        }

    def setup(self, stage: str) -> None:
        """Check precision, data, the backbone's weights and k before anything is computed."""
        check_precision(self.trainer)
        data = data_of(self.trainer)
        check_data(data, self.image_shape, self.num_classes)
        self.load_backbone(data.name)
        check_on_data(self.surrogate.backbone, data)
        # An earlier run's may be of other data, or tensors of inference mode.
        self._bank, self._targets, self._losses = None, {}, LossCheck()
        for scores in self.scores.values():
            cast(MetricCollection, scores).reset()
        check_backend(self.backend)
        rows = len(data.split("train"))
        if not 1 <= self.k < rows:
            raise ValueError(
                f"Expected `k` to be in [1, {rows - 1}] (the bank's rows less the image's own), but got {self.k}."
            )
        index_settings(self.backend, rows, self.index)

    def load_backbone(self, data_name: str) -> None:
        """Load the frozen backbone's weights from its checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint is missing.
            ValueError: If it is damaged or of another architecture or data set.
        """
        if not self.backbone_checkpoint.is_file():
            raise FileNotFoundError(
                f"Expected the backbone's checkpoint at {self.backbone_checkpoint}, but there is none. Train it with"
                " `python train.py fit --config configs/<data>/backbone.yaml` and pass"
                " `--model.init_args.backbone_checkpoint`."
            )
        network = self.surrogate.backbone.network
        backbone = BackboneModule(network, [self.layer], self.image_shape, self.num_classes)
        load_weights(backbone, self.backbone_checkpoint, backbone.identity(data_name))

    def teach(self, votes: Mapping[str, Tensor], features: Mapping[str, Tensor] | None = None) -> None:
        """Learn from votes that are known already, instead of searching for neighbours.

        Args:
            votes: By split, int64 ``(n, C)`` in order of the split's images; leave-one-out for training images.
            features: Raw features of the layer that are known too, by split, float32 ``(n, D)``; kept until the
                next training ends.
        """
        self._votes_given, self._features_given = dict(votes), dict(features or {})

    def on_fit_start(self) -> None:
        """Compute the votes that the surrogate imitates."""
        self._prepare("train")
        self._prepare("val")
        self._bank = None  # its features live on in the training targets

    def teardown(self, stage: str) -> None:
        """Free the features, which can be gigabytes."""
        self._bank, self._targets, self._features_given = None, {}, {}

    def on_validation_start(self) -> None:
        """Compute the validation images' votes, unless a fit has; judge no surrogate whose training has failed."""
        self._losses.look()
        self._prepare("val")

    def on_test_start(self) -> None:
        """Compute the test images' votes."""
        self._prepare("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it holds; an unusable surrogate is not saved."""
        self._losses.look()
        checkpoint[IDENTITY] = self.identity(data_of(self.trainer).name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else."""
        check_identity(checkpoint, self.identity(data_of(self.trainer).name), "the checkpoint")

    def training_step(self, batch: Batch) -> Tensor:
        """Eq. (16) on the leave-one-out votes; the mean over the batch instead of the paper's sum."""
        loss = self._loss(*self._imitate("train", batch)).mean()
        self._losses.add(loss)
        log_loss(self, loss)
        return loss

    def on_train_epoch_end(self) -> None:
        """End no epoch of such a training."""
        self._losses.look()

    def validation_step(self, batch: Batch) -> None:
        """How well the surrogate imitates the kNN on the images that pick the epoch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch) -> None:
        """How well the surrogate imitates the kNN on the test images."""
        self._evaluate("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on DkNNB alone."""
        return torch.optim.Adam(self.surrogate.dknnb.parameters(), lr=self.learning_rate, fused=True)

    @float32_arithmetic()  # as it is attacked, also where training is mixed with shorter numbers
    def _evaluate(self, stage: str, batch: Batch) -> None:
        logits, distribution, classes = self._imitate(stage, batch)
        predicted = logits.argmax(1)
        values = {
            "loss": self._loss(logits, distribution, classes),
            "kl": functional.consistency_loss(logits, distribution),
            "agreement": (predicted == classes).float(),
            "acc": (predicted == batch.labels).float(),
        }
        scores = cast(MetricCollection, self.scores[f"{stage}_scores"])
        for name, value in values.items():
            scores[name].update(value)
        self.log_dict(scores, batch_size=len(batch.labels), prog_bar=True)
        if stage in self._recall:
            self.log(f"{stage}/recall", self._recall[stage], batch_size=len(batch.labels))

    def _loss(self, logits: Tensor, distribution: Tensor, classes: Tensor) -> Tensor:
        return functional.surrogate_loss(logits, distribution, classes, self.cls_weight, self.cl_weight)

    def _imitate(self, split: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(B, C)``, and the kNN's distribution and classes that they should give."""
        targets = self._targets[split]
        rows = torch.searchsorted(targets.ids, batch.ids)
        logits = self.surrogate.dknnb(targets.features[rows])
        return logits, targets.distribution[rows], targets.classes[rows]

    def _prepare(self, split: str) -> None:
        if split in self._targets:
            return
        data = data_of(self.trainer)
        # Tensors made in inference mode could not be trained on later.
        with torch.inference_mode(False), torch.no_grad():
            features, votes = (
                given[split].to(self.device) if split in given else None
                for given in (self._features_given, self._votes_given)
            )
            if features is None or votes is None:
                features, votes = self._compute(split, data, votes)
            ids = data.split(split).ids.to(self.device)
            distribution, classes = functional.vote_distribution(votes), functional.knn_prediction(votes)
            self._targets[split] = _Targets(ids, features, votes, distribution, classes)

    def _compute(self, split: str, data: ImageDataModule, votes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features ``(n, D)`` of a split, and its votes ``(n, C)`` unless they are known."""
        if self._bank is None:
            self._bank = self._extract(data, "train")
        own = self._bank if split == "train" else self._extract(data, split)
        if votes is None:
            votes = self._votes(self._bank, own)
            if self.backend in APPROXIMATE and own is not self._bank:
                self._recall[split] = recall(self._bank, own.features[:RECALL_QUERIES], self.k).mean().item()
        return own.features[:], votes

    def _extract(self, data: ImageDataModule, split: str) -> MemoryBank:
        # Only training images are searched in.
        how = (
            BankSettings(self.metric, self.backend, self.index)
            if split == "train"
            else BankSettings(self.metric)
        )
        batches, over_ranks = data.loader(split, self.device), dist.is_initialized()
        return build_banks(self.surrogate.backbone, batches, self.num_classes, how, over_ranks)[self.layer]

    def _votes(self, bank: MemoryBank, own: MemoryBank) -> Tensor:
        """Votes of the bank on a split's images; of several ranks each computes a part, and all get all."""
        if not dist.is_initialized():
            return bank.leave_one_out_votes(self.k) if own is bank else bank.votes(own.features[:], self.k)
        votes = torch.zeros(len(own), self.num_classes, dtype=torch.int64, device=bank.labels.device)
        mine = torch.arange(len(own), device=votes.device).tensor_split(dist.get_world_size())
        rows = mine[dist.get_rank()]
        own_ids = own.ids[rows] if own is bank else None
        votes[rows] = bank.votes(own.features[rows], self.k, own_ids)
        dist.all_reduce(votes)  # each row is of one rank, the others have zeros
        return votes
