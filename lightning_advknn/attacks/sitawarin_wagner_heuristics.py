"""On the Robustness of Deep k-Nearest Neighbors (Sitawarin and Wagner, arXiv 1903.08333): what it compares its attacks with."""

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
    """Their heuristic for a kNN on pixels: straight towards the nearest mean of another class's training images.

    How far is found by bisection: all the way, then halves; no gradient.

    Args:
        victim: Of one layer that hands its pixels on, as only then its bank holds images.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        search_steps: Of the bisection, at least 0.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: each image's nearest success, or else that mean.

    Raises:
        ValueError: If an argument is out of range, or the victim has another layer than the pixels.
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
    """Their baseline within an L2 ball: imitate, in the first layer, the nearest training image of another class.

    Adam lowers ``||f_1(x') - f_1(x_g)||^2 + c max(0, ||x' - x||^2 - B^2)``; nearest is in the first layer, too. Pixels are a tanh
    within [0, 1].

    Deviations: as in `sitawarin_wagner_l2`, whose bound it shares, so that both are compared at one L2.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius B, true L2 in pixel units, at least 0.
        weight: c, at least 0.
        steps: Number of steps, at least 0.
        lr: Adam's, at least 0.
        check_every: Steps after which the victim is asked, at least 1; it always is after the last.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images in L2 and in [0, 1]: each image's last
        success, or else its last iterate.

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
    """For each image, the nearest mean of another class's training images, of the images' shape."""
    pixels = images.flatten(1)
    features = victim.features(images)
    if len(features) > 1 or not torch.equal(features[victim.layers[0]], pixels):
        raise ValueError(
            f"Expected a victim of one layer that hands its pixels on, but got the layers {list(victim.layers)}. Give the"
            " victim's network an identity as its first layer, and use `only`."
        )
    (bank,) = victim.banks.values()
    classes = torch.unique(bank.labels)
    means = torch.stack([bank.of_class(int(label))[0].features[:].mean(0) for label in classes])  # (C, D)
    own = labels[:, None] == classes
    nearest = torch.cdist(pixels, means).masked_fill(own, torch.inf).argmin(1)
    return means[nearest].view_as(images)
