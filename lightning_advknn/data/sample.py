"""Some images of a split that stand for all of them."""

import torch
from torch import Tensor


def fair_order(labels: Tensor, seed: int) -> Tensor:
    """An order of all images of which every beginning has classes as in the whole, and every class where it is long enough.

    First comes one image of each class; then the j-th image of a class of c in order of (j - 1/2) / c
    (Webster's method of apportionment).

    Args:
        labels: Classes, int64 ``(N,)``.
        seed: Decides which image of a class comes when, and which of two equally large classes.

    Returns:
        Positions of the images, int64 ``(N,)``.

    >>> labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    >>> labels[fair_order(labels, seed=0)][:6].sort().values  # 3 : 2 : 1 is as near to 6 : 3 : 1 as six images come
    tensor([0, 0, 0, 1, 1, 2])
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[shuffled]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(classes).tolist():
        own = (classes == label).nonzero().squeeze(1)
        place[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
        place[own[0]] -= 1  # before all that are not the first of their class
    return shuffled[place.argsort(stable=True)]
