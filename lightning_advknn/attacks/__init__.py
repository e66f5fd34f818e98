"""Attacks as plain functions: ``attack(logits_fn, images, labels, **settings) -> adversarial``, or on a victim instead."""

from lightning_advknn.attacks.ask import ask
from lightning_advknn.attacks.credible import credible
from lightning_advknn.attacks.gradient_sign import bim, fgsm
from lightning_advknn.attacks.kernel import kernel_knn
from lightning_advknn.attacks.minimum_norm import minimum_norm
from lightning_advknn.attacks.parts.arguments import LogitsFn
from lightning_advknn.attacks.settings import Attack, AttackSettings, Target
from lightning_advknn.attacks.sitawarin_wagner import (
    sitawarin_wagner_knn,
    sitawarin_wagner_l2,
    sitawarin_wagner_linf,
)
from lightning_advknn.attacks.sitawarin_wagner_2020 import sitawarin_wagner_minimum_norm
from lightning_advknn.attacks.sitawarin_wagner_heuristics import (
    sitawarin_wagner_baseline,
    sitawarin_wagner_mean,
)
from lightning_advknn.attacks.soft_nearest import soft_nearest
from lightning_advknn.attacks.wang import qp

__all__ = [
    "Attack",
    "AttackSettings",
    "LogitsFn",
    "Target",
    "ask",
    "bim",
    "credible",
    "fgsm",
    "kernel_knn",
    "minimum_norm",
    "qp",
    "sitawarin_wagner_baseline",
    "sitawarin_wagner_knn",
    "sitawarin_wagner_l2",
    "sitawarin_wagner_linf",
    "sitawarin_wagner_mean",
    "sitawarin_wagner_minimum_norm",
    "soft_nearest",
]
