"""Samples of images in which classes have the same shares as in the whole split."""

import torch
from torch import Tensor


def fair_order(labels: Tensor, seed: int) -> Tensor:
    """An order of all images in which the first n, for any n, have nearly the class shares of the whole.

    One image of each class comes first. Then the j-th of c images of a class comes in order of (j - 1/2) / c
    (Webster's method of apportionment).

    Args:
        labels: Classes, int64 ``(N,)``.
        seed: Seed of the order within a class and of ties between classes.

    Returns:
        Positions of the images, int64 ``(N,)``.

    >>> labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    >>> labels[fair_order(labels, seed=0)][:6].sort().values  # six images come closest to 6 : 3 : 1
    tensor([0, 0, 0, 1, 1, 2])
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[shuffled]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(classes).tolist():
        own = (classes == label).nonzero().squeeze(1)
        place[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
        place[own[0]] -= 1  # the first of each class comes before all others
    return shuffled[place.argsort(stable=True)]
