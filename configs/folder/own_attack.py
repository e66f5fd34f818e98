"""An attack of your own. A configuration names such a function by its import path."""

from collections.abc import Callable

import torch
from torch import Tensor

import lightning_advknn as advknn


@advknn.attack(on="logits", norm="linf")
def random_signs(
    logits_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    tries: int = 10,
    seed: int = 0,
) -> Tensor:
    """Try random patterns of +-eps; keep for each image the one that lowers its label's probability most.

    It needs no gradient, so it can also attack the votes of a victim (``targets: [dknn]``).

    Args:
        logits_fn: Maps images to logits ``(B, C)``.
        images: float32 ``(B, channels, H, W)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Change of each pixel.
        tries: Number of patterns.
        seed: Seed of the patterns.

    Returns:
        Adversarial images in [0, 1], same shape.
    """
    generator = torch.Generator().manual_seed(seed)
    best = images.clone()
    lowest = torch.full((len(images),), torch.inf, device=images.device)
    for _ in range(tries):
        signs = torch.randint(0, 2, images.shape, generator=generator).to(images) * 2 - 1
        changed = (images + eps * signs).clamp(0, 1)
        with torch.no_grad():
            score = logits_fn(changed).log_softmax(1).gather(1, labels[:, None]).squeeze(1)  # (B,)
        better = score < lowest
        best[better], lowest[better] = changed[better], score[better]
    return best
