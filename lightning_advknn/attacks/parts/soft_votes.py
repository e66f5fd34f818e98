"""Soft votes: a differentiable approximation of a victim's votes near an image.

A search at the image finds the training images that vote, and their weights. Near the image, votes are then
linear in the features. The soft votes of a layer are sums of ``sigmoid((s_i - eta) / T)`` over the nearest
rows i: s_i is the similarity of row i, eta is halfway between the k-th and the next similarity, and T is
proportional to the spread of the similarities. The votes themselves are the limit for T to 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import LogitsFn
from lightning_advknn.attacks.parts.balls import unit
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import count_votes, dknn_prediction


@dataclass(frozen=True)
class Neighbours:
    """The approximately nearest rows of B images.

    Args:
        similarities: float64 ``(B, n)`` by layer, most similar first.
        rows: Bank rows, int64 ``(B, n)`` by layer.
        votes: Votes of the k nearest rows, int64 ``(B, L, C)``.
        wide_votes: Votes of all n rows, same shape.
    """

    similarities: dict[str, Tensor]
    rows: dict[str, Tensor]
    votes: Tensor
    wide_votes: Tensor

    def fooled(self, labels: Tensor) -> Tensor:
        """Whether the victim's class (Eq. 4) differs from labels ``(B,)``."""
        return dknn_prediction(self.votes) != labels

    def runner_up(self, labels: Tensor) -> Tensor:
        """The wrong class with most votes, int64 ``(B,)``; those of all n rows count a little too."""
        votes = self.votes.sum(1) + 0.1 * self.wide_votes.sum(1)
        return votes.scatter(1, labels[:, None], -1.0).argmax(1)


def check_neighbours(victim: DkNN, neighbours: int, temperature: float) -> None:
    """Raise a ValueError unless `neighbours` is above k and `temperature` is above 0."""
    rows = len(next(iter(victim.banks.values())))
    if not victim.k < neighbours <= rows:
        raise ValueError(
            f"Expected `neighbours` to be in [{victim.k + 1}, {rows}], above `k`, but got {neighbours}."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"Expected `temperature` to be above 0 and finite, but got {temperature}.")


def find_neighbours(victim: DkNN, images: Tensor, n: int) -> Neighbours:
    """Find the n nearest rows of images ``(B, ...)`` in each layer; the scan may miss some of the last."""
    features = victim.features(images)
    victim.queries += len(images)
    similarities, rows, votes, wide_votes = {}, {}, [], []
    for layer, bank in victim.banks.items():
        similarities[layer], rows[layer] = bank.nearby(features[layer], n)
        labels = bank.labels[rows[layer]]
        votes.append(count_votes(labels[:, : victim.k], bank.num_classes))
        wide_votes.append(count_votes(labels, bank.num_classes))
    return Neighbours(similarities, rows, torch.stack(votes, 1), torch.stack(wide_votes, 1))


def vote_directions(
    victim: DkNN, found: Neighbours, targets: Tensor, labels: Tensor | None, temperature: float
) -> dict[str, Tensor]:
    """Gradient of the soft votes for one class minus those for another, with respect to features.

    Args:
        victim: The victim that was searched.
        found: More than k rows in each layer.
        targets: Class to vote for, int64 ``(B,)``.
        labels: Class to vote against, int64 ``(B,)``; None for all others.
        temperature: T, relative to the difference in similarity between the median voter and the last row
            found.

    Returns:
        float32 ``(B, D)`` by layer; with respect to unit features if the metric is cosine.
    """
    k = victim.k
    directions = {}
    for layer, bank in victim.banks.items():
        similarities, rows = found.similarities[layer], found.rows[layer]
        eta = similarities[:, k - 1 : k + 1].mean(1, keepdim=True)
        width = temperature * (similarities[:, k // 2] - similarities[:, -1]).clamp(min=1e-9)[:, None]
        soft = torch.sigmoid((similarities - eta) / width)
        slope = soft * (1 - soft)
        own = bank.labels[rows]
        sides = (own == targets[:, None]).double()
        sides -= (own != targets[:, None]).double() if labels is None else (own == labels[:, None]).double()
        # Votes sum to k, so eta moves by the mean of the similarities, weighted by slope.
        weights = slope * (sides - (slope * sides).sum(1, keepdim=True) / slope.sum(1, keepdim=True)) / width
        mixed = weights.abs().amax(1) > 1e-9  # elsewhere all have one label
        if rows.is_cuda and isinstance(bank.features, Tensor):  # to choose them would make a GPU wait
            directions[layer] = bank.combine(rows, weights.masked_fill(~mixed[:, None], 0.0))
            continue
        mixed = mixed.nonzero().squeeze(1)
        direction = torch.zeros(len(rows), bank.features.shape[1], device=rows.device)
        direction[mixed] = bank.combine(rows[mixed], weights[mixed])
        directions[layer] = direction
    return directions


def ascend_margin(
    logits_fn: LogitsFn, images: Tensor, targets: Tensor, labels: Tensor, batch_size: int
) -> Tensor:
    """Unit gradient of the logit of one class minus that of another; zero stays zero.

    Args:
        logits_fn: Differentiable logits.
        images: float32 ``(B, ...)``.
        targets: Class whose logit rises, int64 ``(B,)``.
        labels: Class whose logit falls, int64 ``(B,)``.
        batch_size: Images differentiated at once.

    Returns:
        Gradients of unit length, same shape as the images.
    """

    def margin(leaf: Tensor, batch: Tensor) -> Tensor:
        logits = logits_fn(leaf)
        return logits.gather(1, targets[batch, None]).sum() - logits.gather(1, labels[batch, None]).sum()

    return _unit_gradients(margin, images, batch_size)


def ascend_votes(victim: DkNN, images: Tensor, directions: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """Unit gradient of soft votes, from the directions of `vote_directions`."""

    def votes(leaf: Tensor, batch: Tensor) -> Tensor:
        features = victim.network.features(leaf)
        total = leaf.new_zeros(())
        for layer, bank in victim.banks.items():
            rows = F.normalize(features[layer], dim=1) if bank.metric == "cosine" else features[layer]
            total = total + (rows * directions[layer][batch]).sum()
        return total

    return _unit_gradients(votes, images, batch_size)


def _unit_gradients(objective: Callable[[Tensor, Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """Unit gradients of an objective, which gets images and their positions."""
    parts = []
    for batch in torch.split(torch.arange(len(images), device=images.device), batch_size):
        leaf = images[batch].detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(leaf, batch), leaf)
        parts.append(unit(gradient))
    return torch.cat(parts)
