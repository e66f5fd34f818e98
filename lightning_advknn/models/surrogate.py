"""DkNNB, the paper's differentiable surrogate of a kNN, on one layer or several."""

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from lightning_advknn import functional
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models.features import FeatureNetwork
from lightning_advknn.models.frozen import Frozen
from lightning_advknn.models.normalize import Normalize

_CHUNK = 64  # consecutive rows that are read together
_READ = 4096  # rows in memory at once, which are shuffled


class DkNNB(nn.Linear):
    """Deep kNN block: one linear layer from the raw features of a layer to class scores.

    Args:
        in_features: D of the layer.
        num_classes: C.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)


class Surrogate(Frozen):
    """The backbone up to one layer, then DkNNB: a module whose logits any attack can differentiate.

    It is always in evaluation mode.

    Args:
        network: The victim's backbone.
        layer: Layer whose features DkNNB gets.
        dknnb: The trained block.
        normalize: Normalisation of the victim before the backbone; None for none.
    """

    def __init__(
        self, network: nn.Module, layer: str, dknnb: DkNNB, normalize: Normalize | None = None
    ) -> None:
        super().__init__()
        self.backbone = FeatureNetwork(network, [layer], normalize)
        self.layer = layer
        self.dknnb = dknnb
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of q(x), ``(B, C)``, for images in [0, 1]."""
        logits: Tensor = self.dknnb(self.backbone.features(images)[self.layer])
        return logits


class JointSurrogate(Frozen):
    """Surrogates of several layers in one module: they approximate DkNN's sum over layers (Eq. 4).

    It is always in evaluation mode.

    Args:
        network: The victim's backbone.
        dknnbs: The trained blocks by layer.
        normalize: Normalisation of the victim before the backbone; None for none.
    """

    def __init__(
        self, network: nn.Module, dknnbs: Mapping[str, DkNNB], normalize: Normalize | None = None
    ) -> None:
        super().__init__()
        self.backbone = FeatureNetwork(network, list(dknnbs), normalize)
        self.dknnbs = nn.ModuleList(dknnbs.values())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` whose softmax is the mean of the layers' q(x), for images in [0, 1]."""
        features = self.backbone.features(images)
        log_q = [
            F.log_softmax(dknnb(features[layer]), dim=1)
            for layer, dknnb in zip(self.backbone.layers, self.dknnbs, strict=True)
        ]
        return torch.stack(log_q).logsumexp(0)  # without the factor 1 / L, which shifts all logits alike


class BankFeatures(Protocol):
    """Features of a bank, ``(M, D)``: a tensor, or rows in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """M and D."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Read rows int64 ``(n,)`` as float32 ``(n, D)``."""


class TrainedDkNNB(NamedTuple):
    """A trained block, and how well it imitates the kNN on held-out rows of the bank."""

    dknnb: DkNNB
    kl: float
    """Mean of Eq. (15)."""
    agreement: float
    """Share of rows on which both predict the same class."""


@float32_arithmetic()
def train_dknnb(
    features: BankFeatures,
    votes: Tensor,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1.0,
    cls_weight: float = 0.3,
    cl_weight: float = 1.0,
    seed: int = 0,
) -> TrainedDkNNB:
    """Train DkNNB by Eq. (16) on the features of a bank, without images.

    Adam trains on nine tenths of the rows. The epoch with the smallest KL (Eq. 15) on the other tenth is
    kept. Weights start at zero, and the learning rate is relative to the size of the features, so the scale
    of a layer does not matter.

    Args:
        features: Raw features of the bank, float32 ``(M, D)``, with M at least 2.
        votes: Leave-one-out votes of its rows, int64 ``(M, C)``, on the device to train on.
        epochs: Passes over the rows.
        batch_size: Rows in a step.
        learning_rate: Approximate limit on how much one step changes a logit. Adam's learning rate is this
            divided by the mean L1 norm of the features.
        cls_weight: lambda of Eq. (16).
        cl_weight: Weight of L_CL; 0 for L_CLS alone.
        seed: Seed of the order of rows. Global random states do not change.

    Raises:
        ValueError: If there are fewer than 2 rows.
    """
    n, width = features.shape
    if n < 2:
        raise ValueError(f"Expected at least 2 bank rows to train a surrogate on, but got {n}.")
    # Victims are often attacked in inference mode or `no_grad`.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(seed)
        dknnb = DkNNB(width, votes.shape[1]).to(votes.device)
        nn.init.zeros_(dknnb.weight)
        nn.init.zeros_(dknnb.bias)
        order = torch.randperm(n, generator=generator)
        size = features[order[:_READ].sort().values].abs().sum(1).mean().clamp(min=1e-30).item()
        held, rest = (part.sort().values for part in order.tensor_split([max(1, n // 10)]))
        rates = ((dknnb.weight, learning_rate / size), (dknnb.bias, learning_rate / width))
        optimizer = Adam([{"params": [parameter], "lr": rate} for parameter, rate in rates])
        best = _kept(dknnb, features, votes, held)
        for _ in tqdm(range(epochs), desc="surrogate", disable=None, leave=False):
            for rows in _blocks(rest, generator):
                own, block = features[rows], votes[rows]
                for batch in torch.split(torch.randperm(len(rows), generator=generator), batch_size):
                    loss = _loss(dknnb(own[batch]), block[batch], cls_weight, cl_weight)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
            epoch = _kept(dknnb, features, votes, held)
            best = epoch if epoch.kl < best.kl else best
    return best


def _blocks(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows in blocks of random chunks: classes are mixed, and files are read mostly in order."""
    chunks = torch.split(rows, _CHUNK)
    for block in torch.split(torch.randperm(len(chunks), generator=generator), _READ // _CHUNK):
        yield torch.cat([chunks[chunk] for chunk in block.sort().values.tolist()])


def _loss(logits: Tensor, votes: Tensor, cls_weight: float, cl_weight: float) -> Tensor:
    """Eq. (16) with the mean over the batch instead of the paper's sum."""
    distribution, labels = functional.vote_distribution(votes), functional.knn_prediction(votes)
    return functional.surrogate_loss(logits, distribution, labels, cls_weight, cl_weight).mean()


@torch.no_grad()
def _kept(dknnb: DkNNB, features: BankFeatures, votes: Tensor, held: Tensor) -> TrainedDkNNB:
    """Copy the block, and measure its KL and agreement on held-out rows."""
    kl = agree = 0.0
    for rows in torch.split(held, _READ):
        logits, own = dknnb(features[rows]), votes[rows]
        kl += functional.consistency_loss(logits, functional.vote_distribution(own)).sum().item()
        agree += (logits.argmax(1) == functional.knn_prediction(own)).sum().item()
    return TrainedDkNNB(copy.deepcopy(dknnb), kl / len(held), agree / len(held))
