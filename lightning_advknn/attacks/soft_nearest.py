"""The attack on a soft 1-NN of Papernot et al. (Transferability in Machine Learning, arXiv 1605.07277)."""

from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least, check_positive
from lightning_advknn.attacks.parts.balls import into_ball, unit
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import ascent
from lightning_advknn.attacks.parts.guide_distances import Guides, each_batch
from lightning_advknn.attacks.parts.guides import nearest_in_each_layer
from lightning_advknn.classifiers import DkNN


@attack(on="victim", norm="l2")
def soft_nearest(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    step_size: float = 0.1,
    steps: int = 50,
    m: int = 20,
    temperature: float = 1.0,
    refresh_every: int = 10,
) -> Tensor:
    """Raise the loss of a soft 1-NN by steps of constant L2 length, until the victim is fooled.

    The soft 1-NN gives class c the probability ``p_c = sum_{i in c} softmax_i(-||f(x) - f(x_i)||^2 / T)``.
    Steps follow the gradient of ``-log p_y``, summed over layers (`ascent` keeps it from vanishing in
    float32). The victim is queried after each step. Without eps, this is a minimum-norm attack with the
    resolution of a step.

    Deviations: In each layer, only the m training images of each class that are nearest to the iterate are
        used, because
    the weights of the others are smaller; they are updated during the attack. The paper's victim has raw
    pixels and its T is 1. Here features are unit vectors if the victim's metric is cosine, for which a
    smaller T is better.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius of an L2 ball in pixel units, at least 0; None for no bound.
        step_size: Length of one step, true L2 in pixel units, at least 0.
        steps: Largest number of steps, at least 0.
        m: Training images of each class in each layer, at least 1.
        temperature: T, above 0.
        refresh_every: Steps between updates of these, at least 1.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]: the first success for each image (the image
        itself if the victim misclassifies it), else the last iterate.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m training images, or a feature is
            not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("steps", "m", "refresh_every"),
        eps=0 if eps is None else eps,
        step_size=step_size,
        steps=steps,
        m=m,
        temperature=temperature,
        refresh_every=refresh_every,
    )
    check_at_least(1, m=m, refresh_every=refresh_every)
    check_positive(temperature=temperature)
    if not len(images):
        return images.clone()
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        adversarial = images.clone()
        radius = torch.inf if eps is None else eps
        walk = partial(_walk, victim, m=int(m), temperature=temperature, step_size=step_size, eps=radius)
        todo = (victim.predict(images) == labels).nonzero().squeeze(1)
        pauses = range(0, int(steps), int(refresh_every))
        for first in tqdm(pauses, desc="attack", disable=None, leave=False):
            some = min(int(refresh_every), int(steps) - first)
            path = walk(images[todo], adversarial[todo], labels[todo], some)
            left = torch.arange(len(todo), device=todo.device)
            for tries in path:
                adversarial[todo[left]] = tries[left]
                left = left[victim.predict(tries[left]) == labels[todo[left]]]
                if not len(left):
                    break
            todo = todo[left]
            if not len(todo):
                break
    return adversarial


def _walk(
    victim: DkNN,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    steps: int,
    *,
    m: int,
    temperature: float,
    step_size: float,
    eps: float,
) -> Tensor:
    """Compute the next iterates ``(steps, B, ...)``, with the training images nearest to the present ones."""
    _, rows = nearest_in_each_layer(victim, adversarial, m)

    def walk(batch: Tensor, guides: Guides) -> Tensor:
        logits_fn = partial(_logits, guides, temperature)
        now, radius = adversarial[batch], torch.full((len(batch),), eps, device=images.device)
        path = []
        for _ in range(steps):
            moved = now + step_size * unit(ascent(logits_fn, now, labels[batch])) - images[batch]
            now = (images[batch] + into_ball(moved, radius, "l2")).clamp(0, 1)
            path.append(now)
        return torch.stack(path)

    return torch.cat(each_batch(victim, rows, walk), 1)


def _logits(guides: Guides, temperature: float, images: Tensor) -> Tensor:
    """Logarithms of p up to a constant, ``(B, L, C)``; their cross-entropy is -log p_y."""
    return (-guides.squared_distances(images) / temperature).logsumexp(3)
