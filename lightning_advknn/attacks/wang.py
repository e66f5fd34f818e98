"""The attack on 1-NN on pixels by quadratic programs (Wang et al., arXiv 1906.03972)."""

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import check_arguments
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.voronoi import exact_minimum
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import float32_arithmetic

_SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the way from the edge of a cell to its training image
_ROUNDING = 1e-5  # relative error of features in float32


@attack(on="victim", norm="l2")
def qp(victim: DkNN, images: Tensor, labels: Tensor) -> Tensor:
    """Find the smallest L2 that fools a 1-NN on pixels: the way into the nearest Voronoi cell of another class.

    It is exact, pixels in [0, 1] included (`parts.voronoi.exact_minimum`). The nearest point lies on the edge
    of the cell, where classes tie. It is moved on towards the training image of the cell until the victim is
    fooled, at first by 1e-6 of the way.

    Args:
        victim: A Euclidean kNN with k = 1, whose features are pixels times one factor each plus a constant.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]; the image itself if the victim misclassifies it
        or has no other class.

    Raises:
        ValueError: If an argument is out of range or the victim is of another kind.
    """
    check_arguments(images, labels, victim=victim)
    if victim.k != 1:
        raise ValueError(f"Expected a victim of k = 1, but got one of k = {victim.k}. Lower its `k`.")
    scaling = pixel_scale(victim, images)
    if scaling is None:
        metrics = [bank.metric for bank in victim.banks.values()]
        raise ValueError(
            "Expected a Euclidean kNN of one layer whose features are pixels times one factor each plus a"
            f" constant, but got layers {list(victim.layers)} with metrics {metrics}. Attack the kNN on a"
            " layer of pixels."
        )
    scale, shift = scaling
    if not len(images):
        return images.clone()
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        (bank,) = victim.banks.values()
        features = victim.features(images)[victim.layers[0]]
        pixels = images.flatten(1).double()
        found = exact_minimum(bank.features[:], bank.labels, features, labels, scale, pixels)
        edges = pixels + found.perturbations
        centres = (bank.features[found.rows.clamp(min=0)].double() - shift) / scale
        adversarial = images.clone()
        # Row -1 means that there is no other class.
        todo = ((victim.predict(images) == labels) & (found.rows >= 0)).nonzero().squeeze(1)
        for share in _SHARES:
            tries = edges[todo] + share * (centres[todo] - edges[todo])
            tries = tries.clamp(0, 1).to(images.dtype).view_as(images[todo])
            adversarial[todo] = tries
            todo = todo[victim.predict(tries) == labels[todo]] if len(todo) else todo
    return adversarial


@torch.no_grad()
@float32_arithmetic()
def pixel_scale(victim: DkNN, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find the scale and shift, float64 ``(D,)``, of a kNN with features ``scale * pixels + shift``.

    Returns None if the victim has several layers, another metric than Euclidean, or other features.

    Args:
        victim: kNN or DkNN.
        images: Images to check this on, float32 ``(B, ...)``, besides a black and a white one.
    """
    if [bank.metric for bank in victim.banks.values()] != ["euclidean"]:
        return None
    (layer,) = victim.layers
    ends = images.new_zeros(2, *images.shape[1:])
    ends[1] = 1
    shift, highest = victim.network.features(ends)[layer].double()
    scale, pixels = highest - shift, images.flatten(1).double()
    if len(scale) != pixels.shape[1] or not scale.all():
        return None
    if len(images):
        features = victim.features(images)[layer].double()
        error = (scale * pixels + shift - features).abs()
        if not (error <= _ROUNDING * (1 + features.abs())).all():
            return None
    return scale, shift
