"""Losses that train the surrogate DkNNB (Eq. 13, 15, 16), one value for each sample.

The paper sums over samples. Training takes the mean over a batch, which only rescales the learning rate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CLS of Eq. (13): -log q_t(x).

    The label t is the kNN's prediction, not the ground truth (Eq. 9 and 12).

    Args:
        logits: Surrogate's raw scores, ``(B, C)``; q is their softmax.
        labels: t, int64 ``(B,)``.

    Returns:
        ``(B,)``.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def consistency_loss(logits: Tensor, distribution: Tensor) -> Tensor:
    """L_CL of Eq. (15): KL(p || q), with 0 log 0 = 0.

    Args:
        logits: Surrogate's raw scores, ``(B, C)``; q is their softmax.
        distribution: p(x), ``(B, C)``, rows sum to one.

    Returns:
        ``(B,)``, at least 0 up to rounding.

    Raises:
        ValueError: If p(x) are counts instead of shares.
    """
    if not distribution.is_floating_point():
        raise ValueError(
            f"Expected p(x) as shares of votes, but got {distribution.dtype}. Use `vote_distribution(votes)`."
        )
    negative_entropy = torch.xlogy(distribution, distribution).sum(1)
    return negative_entropy - (distribution * F.log_softmax(logits, dim=1)).sum(1)


def surrogate_loss(
    logits: Tensor,
    distribution: Tensor,
    labels: Tensor,
    cls_weight: float = 0.3,
    cl_weight: float = 1.0,
) -> Tensor:
    """L = lambda L_CLS + L_CL of Eq. (16).

    Args:
        logits: ``(B, C)``.
        distribution: p(x), ``(B, C)``.
        labels: t, int64 ``(B,)``.
        cls_weight: lambda; 0.3 in the paper.
        cl_weight: Weight of L_CL; 1 in the paper, and 0 in its ablation "DkNNB" (L_CLS alone).

    Returns:
        ``(B,)``.
    """
    loss = cls_weight * classification_loss(logits, labels)
    # The consistency loss may be infinite, and 0 * inf is NaN.
    return loss + cl_weight * consistency_loss(logits, distribution) if cl_weight else loss
