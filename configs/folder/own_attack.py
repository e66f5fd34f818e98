"""An attack of one's own: any such function can be named by a configuration."""

from collections.abc import Callable

import torch
from torch import Tensor


def random_signs(
    logits_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    tries: int = 10,
    seed: int = 0,
) -> Tensor:
    """Of several random patterns of +-eps, keep for each image the one with the lowest logit of its label; no gradients.

    Args:
        logits_fn: Maps images to logits ``(B, C)``.
        images: float32 ``(B, channels, H, W)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.
        eps: Change of each pixel.
        tries: Patterns.
        seed: Of the patterns.

    Returns:
        Images in [0, 1], same shape.
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
