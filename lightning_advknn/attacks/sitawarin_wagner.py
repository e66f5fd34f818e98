"""The attacks of On the Robustness of Deep k-Nearest Neighbors (Sitawarin and Wagner, arXiv 1903.08333).

Each attack pulls an image towards its guides in all layers at once. The guides are the m training images of
one wrong class that are nearest to the image in the first layer; the class is the one with the smallest mean
distance of these m. The loss is the sum over layers l and guides i of ``-sigmoid(a (eta_l - ||f_l(x') -
f_l(x_i)||))``. These are soft votes of guides within eta_l, the mean distance of clean images to their k-th
neighbour. Features f_l are unit vectors if the victim's metric is cosine.

Deviations: eta_l is measured on 500 training images. A pixel at a limit of its range starts inside by 1e-4 of
    half
the range, because tanh has no gradient at its limits. The victim is queried during the descent, and an
iterate that fooled it is returned if there is one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Adam

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import (
    Best,
    Bisection,
    Box,
    LossFn,
    descend,
    last_success,
    squared_l2,
)
from lightning_advknn.attacks.parts.guide_distances import Guides, attack_in_batches, typical_radii
from lightning_advknn.classifiers import DkNN


@attack(on="victim", norm="linf")
def sitawarin_wagner_linf(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    m: int = 75,
    steepness: float = 4.0,
    steps: int = 1000,
    lr: float = 0.1,
    check_every: int = 100,
) -> Tensor:
    """Lower the loss of this file within a Linf ball, by Adam; pixels are a tanh within the ball and [0, 1].

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius in pixel units, at least 0.
        m: Number of guides, at least 1.
        steepness: a, at least 0.
        steps: Number of steps, at least 0.
        lr: Learning rate of Adam, at least 0.
        check_every: Steps between queries of the victim, at least 1; the last iterate is always queried.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images and in [0, 1]: the last success for
        each image, else the last iterate.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m training images, or a feature is
            not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("m", "steps", "check_every"),
        eps=eps,
        m=m,
        steepness=steepness,
        steps=steps,
        lr=lr,
        check_every=check_every,
    )
    check_at_least(1, m=m, check_every=check_every)

    def attack(images: Tensor, labels: Tensor, loss_fn: LossFn) -> Tensor:
        box = Box((images - eps).clamp(min=0), (images + eps).clamp(max=1))
        return last_success(victim, images, labels, loss_fn, box, steps=steps, lr=lr, check_every=check_every)

    return _attack(victim, images, labels, m, steepness, attack)


@attack(on="victim", norm="l2")
def sitawarin_wagner_l2(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    m: int = 500,
    weight: float = 10.0,
    steepness: float = 4.0,
    steps: int = 1000,
    lr: float = 0.1,
    check_every: int = 100,
) -> Tensor:
    """Lower the loss of this file within an L2 ball.

    Adam also lowers the penalty ``c max(0, ||x' - x||^2 - B^2)``. Pixels are a tanh within [0, 1].

    Deviation: The penalty alone does not guarantee the bound, so iterates are projected onto the ball before
    the victim is queried. The paper does not state c.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius B, true L2 in pixel units, at least 0.
        m: Number of guides, at least 1.
        weight: c, at least 0.
        steepness: a, at least 0.
        steps: Number of steps, at least 0.
        lr: Learning rate of Adam, at least 0.
        check_every: Steps between queries of the victim, at least 1; the last iterate is always queried.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images in L2 and in [0, 1]: the last
        success for each image, else the last iterate.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m training images, or a feature is
            not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("m", "steps", "check_every"),
        eps=eps,
        m=m,
        weight=weight,
        steepness=steepness,
        steps=steps,
        lr=lr,
        check_every=check_every,
    )
    check_at_least(1, m=m, check_every=check_every)

    def attack(images: Tensor, labels: Tensor, loss_fn: LossFn) -> Tensor:
        def penalised(adversarial: Tensor) -> Tensor:
            return loss_fn(adversarial) + weight * (squared_l2(images, adversarial) - eps**2).relu()

        box = Box(torch.zeros_like(images), torch.ones_like(images))
        return last_success(
            victim, images, labels, penalised, box, steps=steps, lr=lr, check_every=check_every, radius=eps
        )

    return _attack(victim, images, labels, m, steepness, attack)


@attack(on="victim", norm="l2")
def sitawarin_wagner_knn(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    m: int = 75,
    weight: float = 10.0,
    search_steps: int = 5,
    steepness: float = 4.0,
    steps: int = 200,
    lr: float = 0.1,
    check_every: int = 100,
) -> Tensor:
    """Minimise L2: Adam lowers ``||x' - x||^2`` plus c times the loss of this file.

    Pixels are a tanh within [0, 1]. A small c is searched for each image: c is multiplied by ten until the
    attack succeeds, then bisected.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        m: Number of guides, at least 1.
        weight: The first c, at least 0.
        search_steps: Values of c, at least 0.
        steepness: a, at least 0.
        steps: Steps for each of them, at least 0.
        lr: Learning rate of Adam, at least 0.
        check_every: Steps between queries of the victim, at least 1; the last iterate is always queried.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the nearest success for each image, else the last
        iterate.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m training images, or a feature is
            not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("m", "search_steps", "steps", "check_every"),
        m=m,
        weight=weight,
        search_steps=search_steps,
        steepness=steepness,
        steps=steps,
        lr=lr,
        check_every=check_every,
    )
    check_at_least(1, m=m, check_every=check_every)

    def attack(images: Tensor, labels: Tensor, loss_fn: LossFn) -> Tensor:
        box = Box(torch.zeros_like(images), torch.ones_like(images))
        best = Best(images, smallest=True)
        search = Bisection(images.new_full((len(images),), weight))

        def weighted(variables: Tensor) -> Tensor:
            adversarial = box.images(variables)
            return search.weights * loss_fn(adversarial) + squared_l2(images, adversarial)

        for _ in range(int(search_steps)):
            variables = box.variables(images)
            succeeded = torch.zeros_like(labels, dtype=torch.bool)
            for _ in descend(weighted, variables, Adam([variables], lr=lr), steps, check_every):
                adversarial = box.stored(variables)
                fooled = victim.predict(adversarial) != labels
                best.offer(adversarial, fooled)
                succeeded |= fooled
            search.narrow(succeeded)
        return best.adversarial

    return _attack(victim, images, labels, m, steepness, attack)


def _attack(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    m: int,
    steepness: float,
    attack: Callable[[Tensor, Tensor, LossFn], Tensor],
) -> Tensor:
    """Run an attack on batches of images and labels, with the loss of each batch."""
    if not len(images):
        return images.clone()
    with torch.inference_mode(False):
        radii = typical_radii(victim)

    def with_guides(images: Tensor, labels: Tensor, guides: Guides) -> Tensor:
        def loss_fn(adversarial: Tensor) -> Tensor:
            return _soft_vote_loss(guides.squared_distances(adversarial), radii, steepness)

        return attack(images, labels, loss_fn)

    return attack_in_batches(victim, images, labels, int(m), with_guides)


def _soft_vote_loss(squared_distances: Tensor, radii: Tensor, steepness: float) -> Tensor:
    """The loss of this file, ``(B,)``.

    Args:
        squared_distances: To guides, ``(B, L, m)``.
        radii: eta, ``(L,)``.
        steepness: a.
    """
    distances = squared_distances.clamp(min=1e-12).sqrt()  # not the root of 0, which has no gradient
    return -torch.sigmoid(steepness * (radii[:, None] - distances)).sum((1, 2))
