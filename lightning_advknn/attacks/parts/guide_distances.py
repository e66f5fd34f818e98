"""Distances to guides, which are training images that steer an attack."""

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lightning_advknn.attacks.parts.guides import (
    as_lengths,
    nearest_wrong_class,
)
from lightning_advknn.classifiers import DkNN
from lightning_advknn.search import Bank

_AT_ONCE = {"cpu": 64, "cuda": 1000}  # images: they fit a CPU's caches, and keep a GPU busy
_BYTES = {"cpu": 2**29, "cuda": 2**33}  # memory for guides
_SAMPLE = 500  # bank rows that stand for clean images

_radii: WeakKeyDictionary[Bank, dict[int, Tensor]] = WeakKeyDictionary()  # typical ones, by bank and k


class Guides:
    """Features of the guides of each image in all layers of a victim, gathered once for many steps.

    They are unit vectors if the bank's metric is cosine, so that Euclidean distances have the order of the
    bank's.

    Args:
        victim: Its banks hold the guides.
        rows: Bank rows, int64 ``(B, m)`` or ``(B, C, m)``; by layer, or the same for all layers.
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
                F.normalize(guides, dim=2, out=guides)  # in place, because they are large
            self._layers[layer] = guides, None if cosine else torch.linalg.vecdot(guides, guides)

    def squared_distances(self, images: Tensor) -> Tensor:
        """Squared distances of images to their guides, float32 ``(B, L, m)`` or ``(B, L, C, m)``."""
        features = self._network.features(images)
        distances = []
        for layer, (guides, lengths) in self._layers.items():
            own = features[layer]
            # Most of the cost of a step: the guides are read here and in the gradient.
            products = torch.bmm(own[:, None], guides.transpose(1, 2)).squeeze(1)  # (B, C m)
            if lengths is None:
                # As in the bank, a zero vector has a cosine distance of 1 to all others.
                norms = torch.linalg.vector_norm(own, dim=1, keepdim=True).clamp(min=1e-12)
                distances.append(2 - 2 * products / norms)
            else:
                distances.append(torch.linalg.vecdot(own, own)[:, None] + lengths - 2 * products)
        return torch.stack(distances, 1).clamp(min=0).view(len(images), len(distances), *self._shape)


def images_at_once(victim: DkNN, m: int) -> int:
    """Number of images that are attacked together, limited by the memory of their guides."""
    banks = victim.banks.values()
    device = next(iter(banks)).labels.device.type
    width = sum(bank.features.shape[1] for bank in banks)
    return max(1, min(_AT_ONCE[device], _BYTES[device] // (4 * m * width)))


def typical_radii(victim: DkNN) -> Tensor:
    """Mean distance of training images to their k-th neighbour, by layer, float32 ``(L,)``; leave-one-out.

    It is measured on evenly spaced rows of the bank, so that it does not depend on the attacked images, and once
    for each bank and k.
    """
    radii = []
    for bank in victim.banks.values():
        known = _radii.setdefault(bank, {})
        if victim.k not in known:
            known[victim.k] = _typical_radius(bank, victim.k)
        radii.append(known[victim.k].to(bank.labels.device))
    return torch.stack(radii).float()


def _typical_radius(bank: Bank, k: int) -> Tensor:
    some = torch.linspace(0, len(bank) - 1, min(len(bank), _SAMPLE), device=bank.labels.device).long()
    distances, _ = bank.search(bank.features[some], k, bank.ids[some])
    return as_lengths(bank, distances[:, -1]).mean()


def attack_in_batches(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    m: int,
    attack: Callable[[Tensor, Tensor, Guides], Tensor],
) -> Tensor:
    """Attack images in batches whose guides fit the memory.

    Args:
        victim: Its first layer chooses the guides: the m nearest images of the nearest wrong class.
        images: float32 ``(n, ...)``, at least one.
        labels: Own classes, int64 ``(n,)``.
        m: Number of guides for each image.
        attack: Maps the images, labels and guides of a batch to adversarials.
    """
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
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
    """Run an attack on each batch of images, with the guides of one batch in memory at a time.

    Args:
        victim: Its banks hold the guides.
        rows: Bank rows by layer, int64 ``(n, m)`` or ``(n, C, m)``.
        attack: Maps positions of images, int64 ``(B,)``, and their guides to adversarials.
    """
    first = next(iter(rows.values()))
    positions = torch.arange(len(first), device=first.device)
    batches = torch.split(positions, images_at_once(victim, first[0].numel()))
    return [
        attack(batch, Guides(victim, {layer: each[batch] for layer, each in rows.items()}))
        for batch in tqdm(batches, desc="attack", disable=None, leave=False)
    ]
