"""The attack on a 1-NN on pixels by quadratic programs (Wang et al., arXiv 1906.03972), exact where pixels have no range."""

import torch
from torch import Tensor

from lightning_advknn.attacks.parts.arguments import check_arguments
from lightning_advknn.attacks.parts.declare import attack
from lightning_advknn.attacks.parts.voronoi import exact_minimum
from lightning_advknn.classifiers import DkNN

_SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the way on from a cell's edge to its training image
_ROUNDING = 1e-5  # of features in float32, relative


@attack(on="victim", norm="l2")
def qp(victim: DkNN, images: Tensor, labels: Tensor) -> Tensor:
    """A small L2 perturbation of a 1-NN on pixels: to the cell of another class's training image that is nearest without a range.

    It is the smallest one only if pixels may leave [0, 1], as the quadratic program has no such constraint.
    Its solution is on a cell's edge; it is clamped to [0, 1] and, where the victim is not fooled then, moved
    on towards the cell's training image, by 1e-6 of the way at first and at last all of it. Where much was
    clamped, a smaller perturbation within [0, 1] may exist, perhaps into another cell: distances of this
    attack are upper bounds of the true minimum, `attacks.voronoi.exact_minimum` a lower one.

    Args:
        victim: A kNN, k = 1, as a DkNN of one layer, whose features are pixels times a factor each plus a constant;
            Euclidean.
        images: float32 ``(B, ...)`` in [0, 1].
        labels: Classes to move away from, int64 ``(B,)``.

    Returns:
        Adversarial images, same shape and dtype, in [0, 1]; the image itself if the victim gets it wrong already, or knows no
        other class.

    Raises:
        ValueError: If an argument is out of range or the victim is another.
    """
    check_arguments(images, labels, victim=victim)
    if victim.k != 1:
        raise ValueError(f"Expected a victim of k = 1, but got one of k = {victim.k}. Lower its `k`.")
    scaling = pixel_scale(victim, images)
    if scaling is None:
        metrics = [bank.metric for bank in victim.banks.values()]
        raise ValueError(
            "Expected a Euclidean kNN of one layer whose features are pixels times a factor each plus a constant, but got"
            f" layers {list(victim.layers)} with metrics {metrics}. Attack the kNN on a layer of pixels."
        )
    scale, shift = scaling
    if not len(images):
        return images.clone()
    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()
        (bank,) = victim.banks.values()
        features = victim.features(images)[victim.layers[0]]
        found = exact_minimum(bank.features[:], bank.labels, features, labels, scale)
        pixels = images.flatten(1).double()
        edges = pixels + found.perturbations
        centres = (bank.features[found.rows.clamp(min=0)].double() - shift) / scale
        adversarial = images.clone()
        # Of images that know no other class, none is left to be fooled.
        todo = ((victim.predict(images) == labels) & (found.rows >= 0)).nonzero().squeeze(1)
        for share in _SHARES:
            tries = edges[todo] + share * (centres[todo] - edges[todo])
            tries = tries.clamp(0, 1).to(images.dtype).view_as(images[todo])
            adversarial[todo] = tries
            todo = todo[victim.predict(tries) == labels[todo]] if len(todo) else todo
    return adversarial


@torch.no_grad()
def pixel_scale(victim: DkNN, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """How a kNN on pixels makes its features: ``scale * pixels + shift``, both float64 ``(D,)``.

    None if the victim is none: if it has several layers, another metric than Euclidean, or other features.

    Args:
        victim: kNN, as a DkNN of one layer, or DkNN.
        images: Some of which this must be true, float32 ``(B, ...)``; what else it is asked is black and white.
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
