"""Minimum-Norm Adversarial Examples on KNN and KNN-Based Models (Sitawarin and Wagner, arXiv 2003.06559)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import RMSprop
from tqdm import tqdm

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import Best, Bisection, Box, descend, squared_l2
from lightning_advknn.attacks.parts.guide_distances import Guides, images_at_once
from lightning_advknn.attacks.parts.guides import nearest_of_classes, nearest_wrong_class
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import dknn_prediction

_BEYOND = 1e-5  # margin by which a guide must pass the k-th neighbour


@attack(on="victim", norm="l2")
def sitawarin_wagner_minimum_norm(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    m: int = 100,
    weight: float = 1.0,
    search_steps: int = 5,
    steps: int = 500,
    lr: float = 0.01,
    refresh_every: int = 100,
) -> Tensor:
    """Minimise L2 while guides of a wrong class join the k neighbours and guides of the own class leave them.

    The guides of an iterate are the nearest m / 2 training images of its own class (a_i = -1) and of one
    wrong class (a_i = +1), in the first layer. The wrong class is the one whose m / 2 images nearest to the
    clean image have the smallest mean distance. RMSprop lowers ``||x' - x||^2`` plus c times the sum over
    layers l and guides i of ``relu(a_i (||f_l(x') - f_l(x_i)||^2 - eta_l^2) + 1e-5)``, where eta_l is the
    distance of the iterate to its k-th neighbour. Features are unit vectors if the victim's metric is cosine.
    Guides and eta_l are updated during the descent. Pixels are a tanh within [0, 1]. A small c is searched
    for each image: c is multiplied by ten until the attack succeeds, then bisected. After a success, m / 2
    moves half of the way to (k + 1) // 2.

    Deviations: The first c and the way in which m shrinks are chosen here; (k + 1) // 2 guides are a majority
        of the
    k neighbours. The victim is queried at each update and at the end of each descent, and the nearest success
    among these iterates is returned. A pixel at a limit of its range starts inside by 1e-4 of half the range,
    because tanh has no gradient at its limits.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        m: Number of guides at first, at least 2.
        weight: The first c, at least 0.
        search_steps: Values of c, at least 0.
        steps: Steps for each of them, at least 0.
        lr: Learning rate of RMSprop, at least 0.
        refresh_every: Steps between updates of guides and eta_l, at least 1.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the nearest success for each image, else the last
        iterate.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m / 2 training images, or a
            feature is not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("m", "search_steps", "steps", "refresh_every"),
        m=m,
        weight=weight,
        search_steps=search_steps,
        steps=steps,
        lr=lr,
        refresh_every=refresh_every,
    )
    check_at_least(2, m=m)
    check_at_least(1, refresh_every=refresh_every)
    if not len(images):
        return images.clone()
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        half, fewest = int(m) // 2, min(int(m) // 2, (victim.k + 1) // 2)
        batches = torch.split(
            torch.arange(len(images), device=images.device), images_at_once(victim, 2 * half)
        )
        best = Best(images, smallest=True)
        search = Bisection(images.new_full((len(images),), weight))
        halves = torch.full_like(labels, half)
        start = _look(victim, images, labels)
        best.offer(images, start.fooled)
        bank = victim.banks[victim.layers[0]]
        wrong, _ = nearest_wrong_class(bank, start.features, labels, half)

        def around(view: _View) -> Tensor:
            rows = [nearest_of_classes(bank, view.features, classes, half) for classes in (wrong, labels)]
            return torch.cat(rows, 1)

        first = around(start)
        for _ in tqdm(range(int(search_steps)), desc="attack", disable=None, leave=False):
            descents = [_Descent(images[rows], search.weights[rows], halves[rows], lr) for rows in batches]
            view, succeeded = start, start.fooled
            for done in range(0, int(steps), int(refresh_every)):
                guides = around(view) if done else first
                some = min(int(refresh_every), int(steps) - done)
                parts = [
                    descent.run(Guides(victim, guides[rows]), view.radii[rows], some)
                    for descent, rows in zip(descents, batches, strict=True)
                ]
                adversarial = torch.cat(parts)
                view = _look(victim, adversarial, labels)
                best.offer(adversarial, view.fooled)
                succeeded = succeeded | view.fooled
            search.narrow(succeeded)
            halves = torch.where(succeeded, (halves + fewest) // 2, halves)
    return best.adversarial


class _View(NamedTuple):
    """Neighbourhoods of n images."""

    features: Tensor
    """Features of the first layer, float32 ``(n, D)``."""
    radii: Tensor
    """Approximate distance to the k-th neighbour in each layer, float32 ``(n, L)``."""
    fooled: Tensor
    """Whether the victim is fooled, bool ``(n,)``."""


def _look(victim: DkNN, images: Tensor, labels: Tensor) -> _View:
    features = victim.features(images)
    radii = []
    for layer, bank in victim.banks.items():
        kth = bank.nearby(features[layer], victim.k)[0][:, -1]
        radii.append((2 - 2 * kth if bank.metric == "cosine" else -kth).clamp(min=0).sqrt())
    fooled = dknn_prediction(victim.votes(features)) != labels
    return _View(features[victim.layers[0]], torch.stack(radii, 1).float(), fooled)


class _Descent:
    """RMSprop on a batch of images, in parts between which guides change.

    Args:
        images: Clean images ``(B, ...)``.
        weights: c, ``(B,)``.
        halves: Number of guides of each class that count, int64 ``(B,)``.
        lr: Learning rate of RMSprop.
    """

    def __init__(self, images: Tensor, weights: Tensor, halves: Tensor, lr: float) -> None:
        self._images, self._weights, self._halves = images, weights, halves
        self._box = Box(torch.zeros_like(images), torch.ones_like(images))
        self._variables = self._box.variables(images)
        self._optimizer = RMSprop([self._variables], lr=lr)

    def run(self, guides: Guides, radii: Tensor, steps: int) -> Tensor:
        """Take steps with these guides and distances ``(B, L)`` to the k-th neighbour; return iterates."""

        def loss_fn(variables: Tensor) -> Tensor:
            adversarial = self._box.images(variables)
            hinges = _hinge_loss(guides.squared_distances(adversarial), radii, self._halves)
            return squared_l2(self._images, adversarial) + self._weights * hinges

        for _ in descend(loss_fn, self._variables, self._optimizer, steps, steps):
            pass
        adversarial: Tensor = self._box.stored(self._variables)
        return adversarial


def _hinge_loss(squared_distances: Tensor, radii: Tensor, halves: Tensor) -> Tensor:
    """Sum how far guides of the wrong class are outside the k neighbours and own ones inside, ``(B,)``.

    Args:
        squared_distances: Distances to guides, ``(B, L, m)``: first those of the wrong class, then those of
            the own one.
        radii: Distance to the k-th neighbour, ``(B, L)``.
        halves: Number of guides of each class that count, the nearest, int64 ``(B,)``.
    """
    half = squared_distances.shape[2] // 2
    place = torch.arange(2 * half, device=radii.device)
    counted = place % half < halves[:, None]  # (B, m)
    beyond = squared_distances - radii.square()[:, :, None]
    hinges = (torch.where(place < half, beyond, -beyond) + _BEYOND).relu()
    return (hinges * counted[:, None]).sum((1, 2))
