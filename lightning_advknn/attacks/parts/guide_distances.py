"""What attacks that steer by guides share: which they are, how far, and how near counts."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lightning_advknn.attacks.parts.guides import (
    as_lengths,
    nearest_wrong_class,
)
from lightning_advknn.classifiers import DkNN

_AT_ONCE = {"cpu": 64, "cuda": 1000}  # images: what fits a CPU's caches, and what keeps a GPU busy
_BYTES = {"cpu": 2**29, "cuda": 2**33}  # of guides in memory
_SAMPLE = 500  # bank rows whose neighbours are typical of clean images


class Guides:
    """Features of each image's guides in every layer of a victim, gathered once for many steps.

    They are unit vectors where the bank's metric is cosine, so that Euclidean distances order as the bank's do.

    Args:
        victim: Whose banks hold the guides.
        rows: Bank rows, int64 ``(B, m)`` or ``(B, C, m)``: by layer, or one for all layers.
    """

    @torch.no_grad()
    def __init__(self, victim: DkNN, rows: Tensor | Mapping[str, Tensor]) -> None:
        self._network, self._layers = victim.network, {}
        for layer, bank in victim.banks.items():
            own = rows if isinstance(rows, Tensor) else rows[layer]
            self._shape = own.shape[1:]
            guides = bank.features[own.flatten()].view(len(own), self._shape.numel(), -1)  # (B, C m, D)
            cosine = bank.metric == "cosine"
            if cosine:
                F.normalize(guides, dim=2, out=guides)  # in place: they are large
            self._layers[layer] = guides, None if cosine else torch.linalg.vecdot(guides, guides)

    def squared_distances(self, images: Tensor) -> Tensor:
        """Of images ``(B, ...)`` to their own guides in each layer, float32 ``(B, L, m)`` or ``(B, L, C, m)``."""
        features = self._network.features(images)
        distances = []
        for layer, (guides, lengths) in self._layers.items():
            own = features[layer]
            # Two reads of the guides a step, here and in the gradient: that is most of what a step costs.
            products = torch.bmm(own[:, None], guides.transpose(1, 2)).squeeze(1)  # (B, C m)
            if lengths is None:
                # A zero vector is as far from all as the bank has it, at a cosine distance of 1.
                norms = torch.linalg.vector_norm(own, dim=1, keepdim=True).clamp(min=1e-12)
                distances.append(2 - 2 * products / norms)
            else:
                distances.append(torch.linalg.vecdot(own, own)[:, None] + lengths - 2 * products)
        return torch.stack(distances, 1).clamp(min=0).view(len(images), len(distances), *self._shape)


def images_at_once(victim: DkNN, m: int) -> int:
    """How many images are attacked together, by the memory that their guides take."""
    banks = victim.banks.values()
    device = next(iter(banks)).labels.device.type
    width = sum(bank.features.shape[1] for bank in banks)
    return max(1, min(_AT_ONCE[device], _BYTES[device] // (4 * m * width)))


def typical_radii(victim: DkNN) -> Tensor:
    """Mean distance of training images to their k-th neighbour beside themselves, in each layer, float32 ``(L,)``.

    Of evenly spaced rows of the bank, so that no attack depends on which images are attacked together.
    """
    radii = []
    for bank in victim.banks.values():
        some = torch.linspace(0, len(bank) - 1, min(len(bank), _SAMPLE), device=bank.labels.device).long()
        distances, _ = bank.search(bank.features[some], victim.k, bank.ids[some])
        radii.append(as_lengths(bank, distances[:, -1]).mean())
    return torch.stack(radii).float()


def attack_in_batches(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    m: int,
    attack: Callable[[Tensor, Tensor, Guides], Tensor],
) -> Tensor:
    """Attack images in batches, all of whose guides are in memory.

    Args:
        victim: Its first layer chooses the guides, the m nearest images of the nearest wrong class.
        images: float32 ``(n, ...)``, at least one.
        labels: Own classes, int64 ``(n,)``.
        m: Guides of an image.
        attack: Of a batch's images, labels and guides, the adversarials.
    """
    # Outside of inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        first = victim.layers[0]
        features = victim.features(images)[first]
        _, rows = nearest_wrong_class(victim.banks[first], features, labels, m)
        by_layer = dict.fromkeys(victim.layers, rows)
        return torch.cat(
            each_batch(victim, by_layer, lambda batch, guides: attack(images[batch], labels[batch], guides))
        )


def each_batch(
    victim: DkNN, rows: Mapping[str, Tensor], attack: Callable[[Tensor, Guides], Tensor]
) -> list[Tensor]:
    """What an attack makes of each batch of images, of which only one's guides are in memory at a time.

    Args:
        victim: Whose banks hold the guides.
        rows: Bank rows by layer, int64 ``(n, m)`` or ``(n, C, m)``.
        attack: Gets positions of images, int64 ``(B,)``, and their guides.
    """
    first = next(iter(rows.values()))
    positions = torch.arange(len(first), device=first.device)
    batches = torch.split(positions, images_at_once(victim, first[0].numel()))
    return [
        attack(batch, Guides(victim, {layer: each[batch] for layer, each in rows.items()}))
        for batch in tqdm(batches, desc="attack", disable=None, leave=False)
    ]
