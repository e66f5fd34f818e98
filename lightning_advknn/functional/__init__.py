"""The paper's equations, one pure function each, and checks of their arguments; imports torch only."""

from lightning_advknn.functional.arithmetic import (
    autocast_devices,
    check_defaults,
    float32_arithmetic,
    ieee_arithmetic,
    reproducible_convolutions,
    tf32_arithmetic,
)
from lightning_advknn.functional.credibility import credibility, true_class_votes
from lightning_advknn.functional.distortion import authors_l2, l2_distortion, linf_distortion
from lightning_advknn.functional.images import check_images, check_labels
from lightning_advknn.functional.losses import (
    classification_loss,
    consistency_loss,
    surrogate_loss,
)
from lightning_advknn.functional.voting import (
    count_votes,
    dknn_prediction,
    knn_prediction,
    vote_distribution,
)

__all__ = [
    "authors_l2",
    "autocast_devices",
    "check_defaults",
    "check_images",
    "check_labels",
    "classification_loss",
    "consistency_loss",
    "count_votes",
    "credibility",
    "dknn_prediction",
    "float32_arithmetic",
    "ieee_arithmetic",
    "knn_prediction",
    "l2_distortion",
    "linf_distortion",
    "reproducible_convolutions",
    "surrogate_loss",
    "tf32_arithmetic",
    "true_class_votes",
    "vote_distribution",
]
