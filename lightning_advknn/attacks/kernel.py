"""The kernel attack on kNN from JTLA (Raghuram et al., arXiv 2007.15147)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import RMSprop
from tqdm import tqdm

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least, check_positive
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import Best, Bisection, Box, descend, own_and_others, squared_l2
from lightning_advknn.attacks.parts.guide_distances import Guides, each_batch
from lightning_advknn.attacks.parts.guides import nearest_in_each_layer
from lightning_advknn.classifiers import DkNN


@attack(on="victim", norm="l2")
def kernel_knn(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    m: int = 20,
    bandwidth: float = 1.0,
    weight: float = 1.0,
    search_steps: int = 5,
    steps: int = 500,
    lr: float = 0.01,
    check_every: int = 100,
) -> Tensor:
    """Minimise L2 while the kernels to the own class fall below those to all other classes.

    RMSprop lowers ``||d||^2 + c (log mean kernel to own class - log mean kernel to others)``, as in Carlini
    and Wagner's attack. Pixels are a tanh within [0, 1]. A small c is searched for each image: c is
    multiplied by ten until the attack succeeds, then bisected. The kernel is ``exp(-||f(x) - f(x_i)||^2 /
    sigma^2)``, and its mean is over training images and layers. Features are unit vectors if the victim's
    metric is cosine.

    Deviations: In each layer, only the m training images of each class that are nearest to the clean image
        are used.
    The paper chooses sigma for each image and layer among multiples, .6 to 4.4, of ``sqrt(eta_k^2 -
    eta_1^2)``, where eta_k is the distance to the k-th neighbour; here sigma is `bandwidth` times this value
    for the m-th. A pixel of 0 or 1 starts 5e-5 inside the range, because tanh has no gradient at its limits.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        m: Training images of each class in each layer, at least 2.
        bandwidth: Bandwidth of the kernel, above 0.
        weight: The first c, above 0.
        search_steps: Values of c, at least 0.
        steps: Steps for each of them, at least 1.
        lr: Learning rate of RMSprop, at least 0.
        check_every: Steps between queries of the victim, at least 1; the last iterate is always queried.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the nearest success for each image (the image
        itself if the victim misclassifies it), else the last iterate.

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
        bandwidth=bandwidth,
        weight=weight,
        search_steps=search_steps,
        steps=steps,
        lr=lr,
        check_every=check_every,
    )
    check_at_least(2, m=m)
    check_at_least(1, steps=steps, check_every=check_every)
    check_positive(bandwidth=bandwidth, weight=weight)
    if not len(images):
        return images.clone()
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        squares, rows = nearest_in_each_layer(victim, images, int(m))
        widths = bandwidth**2 * _squared_widths(squares).to(images.dtype)  # (B, L)
        best, search = Best(images, smallest=True), Bisection(images.new_full((len(images),), weight))
        best.offer(images, victim.predict(images) != labels)

        def attack(batch: Tensor, guides: Guides) -> Tensor:
            clean, box = images[batch], Box(torch.zeros_like(images[batch]), torch.ones_like(images[batch]))

            def loss_fn(variables: Tensor) -> Tensor:
                adversarial = box.images(variables)
                margins = _kernel_margins(guides.squared_distances(adversarial), widths[batch], labels[batch])
                return squared_l2(clean, adversarial) + search.weights[batch] * margins

            variables = box.variables(clean)
            optimizer = RMSprop([variables], lr=lr)
            pauses = descend(loss_fn, variables, optimizer, int(steps), int(check_every))
            return torch.stack([box.stored(variables) for _ in pauses])

        for _ in tqdm(range(int(search_steps)), desc="search", disable=None, leave=False):
            succeeded = torch.zeros_like(labels, dtype=torch.bool)
            for tries in torch.cat(each_batch(victim, rows, attack), 1):
                fooled = victim.predict(tries) != labels
                best.offer(tries, fooled)
                succeeded |= fooled
            search.narrow(succeeded)
    return best.adversarial


def _squared_widths(squares: Mapping[str, Tensor]) -> Tensor:
    """Compute ``eta_m^2 - eta_1^2``, ``(B, L)``, at least 1e-4 of the largest squared distance.

    Args:
        squares: Squared distances to the m nearest of each class by layer, ``(B, C, m)``.
    """
    widths = []
    for each in squares.values():
        nearest = each.flatten(1).sort().values[:, : each.shape[2]]  # of all classes
        least = 1e-4 * each.flatten(1).amax(1)
        least = least.masked_fill(least == 0, 1.0)  # all distances are 0: any width will do
        widths.append(torch.maximum(nearest[:, -1] - nearest[:, 0], least))
    return torch.stack(widths, 1)


def _kernel_margins(squares: Tensor, widths: Tensor, labels: Tensor) -> Tensor:
    """Log mean kernel to the own class minus log mean kernel to all others, ``(B,)``.

    Args:
        squares: Squared distances, ``(B, L, C, m)``.
        widths: sigma^2 ``(B, L)``.
        labels: Own classes, int64 ``(B,)``.
    """
    logits = (-squares / widths[:, :, None, None]).logsumexp(3)  # (B, L, C)
    own, others = (each.logsumexp(1) for each in own_and_others(logits, labels))
    # The other classes have C - 1 times as many training images.
    return own - others + math.log(squares.shape[2] - 1)
