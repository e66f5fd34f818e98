"""ASK: Adversarial Soft k-Nearest Neighbor Attack and Defense (Wang et al., arXiv 2106.14300)."""

from functools import partial

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import check_arguments, check_at_least, check_positive
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.descent import ascent
from lightning_advknn.attacks.parts.guide_distances import Guides, each_batch
from lightning_advknn.attacks.parts.guides import nearest_in_each_layer
from lightning_advknn.classifiers import DkNN


@attack(on="victim", norm="linf")
def ask(
    victim: DkNN,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    m: int = 5,
    temperature: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Move away from the nearest training images of the own class, towards the others', in a Linf ball.

    In each layer, the guides of a clean image are its m nearest training images of every class. They do not
    change. The logit of a class is the mean similarity to its guides, divided by T. Similarity is the cosine
    if the victim's metric is cosine, else minus the Euclidean distance. From a random start in the ball,
    steps along the sign of the gradient raise the cross-entropy of these logits, summed over layers. The
    victim is never queried.

    Args:
        victim: DkNN, or a kNN as a DkNN of one layer.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Radius of the Linf ball in pixel units, at least 0.
        step_size: Length of one step in pixel units, at least 0.
        steps: Number of steps, at least 0.
        m: Guides of each class in each layer, at least 1.
        temperature: T, above 0.
        seed: Seed of the random start.

    Returns:
        Adversarial images, same shape and dtype, within eps of the images and in [0, 1]: the last iterates.

    Raises:
        ValueError: If an argument is out of range, a class has fewer than m training images, or a feature is
            not finite.
    """
    check_arguments(
        images,
        labels,
        victim=victim,
        whole=("steps", "m", "seed"),
        eps=eps,
        step_size=step_size,
        steps=steps,
        m=m,
        temperature=temperature,
        seed=seed,
    )
    check_at_least(1, m=m)
    check_positive(temperature=temperature)
    if not len(images):
        return images.clone()
    # Not in inference mode (`trainer.validate`, `test`), and on copies: autograd refuses tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        lowest, highest = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)
        # Drawn on the CPU, so that all devices get the same numbers.
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(int(seed)))
        start = (images + eps * (2 * noise - 1).to(images)).clamp(lowest, highest)
        _, rows = nearest_in_each_layer(victim, images, int(m))
        cosine = torch.tensor([bank.metric == "cosine" for bank in victim.banks.values()])
        cosine = cosine.to(images.device)[:, None, None]  # (L, 1, 1)

        def attack(batch: Tensor, guides: Guides) -> Tensor:
            logits_fn = partial(_similarity_logits, guides, cosine, temperature)
            adversarial = start[batch]
            for _ in range(int(steps)):
                direction = ascent(logits_fn, adversarial, labels[batch]).sign()
                adversarial = adversarial + step_size * direction
                adversarial = adversarial.clamp(lowest[batch], highest[batch])
            return adversarial

        return torch.cat(each_batch(victim, rows, attack))


def _similarity_logits(guides: Guides, cosine: Tensor, temperature: float, images: Tensor) -> Tensor:
    """Logits ``(B, L, C)``: mean similarities divided by T.

    Args:
        guides: Guides of the images.
        cosine: Whether the similarity of a layer is the cosine, bool ``(L, 1, 1)``.
        temperature: T.
        images: ``(B, ...)``.
    """
    squares = guides.squared_distances(images)  # (B, L, C, m)
    lengths = squares.clamp(min=1e-12).sqrt()  # not the root of 0, which has no gradient
    similarities = torch.where(cosine, 1 - squares / 2, -lengths)
    return similarities.mean(3) / temperature
