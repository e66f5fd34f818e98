"""Credibility of a DkNN prediction against a calibration set (Eq. 5-6)."""

import torch
from torch import Tensor

from lightning_advknn.choices import Convention, check_choice
from lightning_advknn.functional.images import check_labels
from lightning_advknn.functional.voting import dknn_prediction


def true_class_votes(votes: Tensor, labels: Tensor) -> Tensor:
    """Votes for each sample's true class, by layer; the right side of Eq. (5).

    Args:
        votes: int64 ``(N, L, C)``.
        labels: True classes, int64 ``(N,)``.

    Returns:
        int64 ``(N, L)``; `credibility` takes its sum over layers.

    Raises:
        ValueError: If there is not one label for each sample, or a label is not in [0, C).
    """
    check_labels(labels, len(votes), votes.shape[2])
    index = labels[:, None, None].expand(-1, votes.shape[1], 1)
    return votes.gather(2, index).squeeze(2)  # (N, L)


def credibility(votes: Tensor, calibration_votes: Tensor, convention: Convention = "strict") -> Tensor:
    """Share of the calibration samples with fewer true-class votes than the prediction has (Eq. 5).

    Let v be the votes of the predicted class (Eq. 4), and a_n the true-class votes of calibration sample n:

    - ``strict``: share of a_n < v, which is Eq. (5) read literally.
    - ``ge``: share of a_n <= v, the calibration nonconformities (kL - a_n) at or above the prediction's.
      The authors' code also *predicts* the class of highest share, which saturates. Here the prediction is
      always Eq. (4); its class has the highest share too, so the credibility is the same.
    - ``trim_zeros``: ``ge`` without calibration samples of nonconformity 0 (a_n = kL).

    Args:
        votes: int64 ``(B, L, C)``.
        calibration_votes: True-class votes summed over the same L layers, int64 ``(N,)``.
        convention: Which calibration samples count, as above.

    Returns:
        float64 ``(B,)`` in [0, 1].

    Raises:
        ValueError: If the calibration set is not of shape ``(N,)`` or is empty, also once trimmed; or if the
            convention is unknown.

    >>> votes = torch.tensor([[[3, 0], [2, 1]]])
    >>> credibility(votes, torch.tensor([6, 5, 5, 1]), "strict")
    tensor([0.2500], dtype=torch.float64)
    >>> credibility(votes, torch.tensor([6, 5, 5, 1]), "ge")
    tensor([0.7500], dtype=torch.float64)
    >>> credibility(votes, torch.tensor([6, 5, 5, 1]), "trim_zeros")
    tensor([1.], dtype=torch.float64)
    """
    check_choice("convention", convention, Convention)
    if calibration_votes.ndim != 1:
        raise ValueError(
            f"Expected `calibration_votes` of shape (N,), but got {tuple(calibration_votes.shape)}. Sum them"
            " over layers."
        )
    if convention == "trim_zeros" and len(votes):
        all_votes = votes[0].sum()  # kL
        calibration_votes = calibration_votes[calibration_votes < all_votes]
    if not len(calibration_votes):
        raise ValueError(
            "Expected at least one calibration sample"
            + (" with a nonconformity above 0" if convention == "trim_zeros" else "")
            + ", but got none. Use a larger calibration set or another `convention`."
        )
    predicted = votes.sum(1).gather(1, dknn_prediction(votes)[:, None])  # (B, 1)
    compare = torch.lt if convention == "strict" else torch.le
    conforms = compare(calibration_votes, predicted)  # (B, N)
    return conforms.to(torch.float64).mean(1)
