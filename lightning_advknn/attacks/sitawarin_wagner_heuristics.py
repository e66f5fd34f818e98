"""The baselines of On the Robustness of Deep k-Nearest Neighbors (Sitawarin and Wagner, arXiv 1903.08333)."""

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least
from lightning_advknn.attacks.parts.balls import per_image
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import Best, Box, last_success, squared_l2
from lightning_advknn.attacks.parts.guide_distances import Guides, attack_in_batches
from lightning_advknn.classifiers import DkNN


@attack(on="victim", norm="l2")
def sitawarin_wagner_mean(victim: DkNN, images: Tensor, labels: Tensor, *, search_steps: int = 5) -> Tensor:
    """Move straight towards the nearest mean of another class's training images.

    This is their heuristic for a kNN on pixels. Bisection finds how far, starting with the whole way. There
    is no gradient.

    Args:
        victim: A victim of one layer that returns the pixels, so that its bank holds images.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        search_steps: Steps of the bisection, at least 0.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the nearest success for each image, else the
        mean.

    Raises:
        ValueError: If an argument is out of range, or the victim's features are not the pixels.
    """
    check_arguments(images, labels, victim=victim, whole=("search_steps",), search_steps=search_steps)
    if not len(images):
        return images.clone()
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        means = _nearest_means(victim, images, labels).to(images.dtype)
        best = Best(images, smallest=True)
        low, high = (torch.full((len(images),), share, device=images.device) for share in (0.0, 1.0))
        share = high
        for _ in range(int(search_steps) + 1):
            adversarial = torch.lerp(images, means, per_image(share, images)).clamp(0, 1)
            fooled = victim.predict(adversarial) != labels
            best.offer(adversarial, fooled)
            low, high = torch.where(fooled, low, share), torch.where(fooled, share, high)
            share = (low + high) / 2
        return best.adversarial


@attack(on="victim", norm="l2")
def sitawarin_wagner_baseline(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    weight: float = 0.1,
    steps: int = 1000,
    lr: float = 0.1,
    check_every: int = 100,
) -> Tensor:
    """Imitate the nearest training image of another class in the first layer, in an L2 ball: their baseline.

    Adam lowers ``||f_1(x') - f_1(x_g)||^2 + c max(0, ||x' - x||^2 - B^2)``, where x_g is nearest in the first
    layer. Pixels are a tanh within [0, 1].

    Deviations: As in `sitawarin_wagner_l2`. Both have the same bound, so that they are compared at the same
        L2.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius B, true L2 in pixel units, at least 0.
        weight: c, at least 0.
        steps: Number of steps, at least 0.
        lr: Learning rate of Adam, at least 0.
        check_every: Steps between queries of the victim, at least 1; the last iterate is always queried.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images in L2 and in [0, 1]: the last
        success for each image, else the last iterate.

    Raises:
        ValueError: If an argument is out of range, or a feature is not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("steps", "check_every"),
        eps=eps,
        weight=weight,
        steps=steps,
        lr=lr,
        check_every=check_every,
    )
    check_at_least(1, check_every=check_every)
    if not len(images):
        return images.clone()

    def attack(images: Tensor, labels: Tensor, guides: Guides) -> Tensor:
        def loss_fn(adversarial: Tensor) -> Tensor:
            far = (squared_l2(images, adversarial) - eps**2).relu()
            return guides.squared_distances(adversarial)[:, 0, 0] + weight * far

        box = Box(torch.zeros_like(images), torch.ones_like(images))
        return last_success(
            victim, images, labels, loss_fn, box, steps=steps, lr=lr, check_every=check_every, radius=eps
        )

    return attack_in_batches(victim.only(victim.layers[0]), images, labels, 1, attack)


def _nearest_means(victim: DkNN, images: Tensor, labels: Tensor) -> Tensor:
    """Find the nearest mean of another class's training images for each image, in the images' shape."""
    pixels = images.flatten(1)
    features = victim.features(images)
    if len(features) > 1 or not torch.equal(features[victim.layers[0]], pixels):
        raise ValueError(
            f"Expected a victim of one layer that returns the pixels, but got layers {list(victim.layers)}."
            " Add `torch.nn.Identity()` to the network as its first layer, and use `only` with it."
        )
    (bank,) = victim.banks.values()
    classes = torch.unique(bank.labels)
    means = torch.stack([bank.of_class(int(label))[0].features[:].mean(0) for label in classes])  # (C, D)
    own = labels[:, None] == classes
    nearest = torch.cdist(pixels, means).masked_fill(own, torch.inf).argmin(1)
    return means[nearest].view_as(images)
