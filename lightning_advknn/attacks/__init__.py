"""Attacks as plain functions: ``attack(logits_fn, images, labels, **settings) -> adversarial``, or on a victim instead."""

from lightning_advknn.attacks.credible import credible
from lightning_advknn.attacks.gradient_sign import LogitsFn, bim, fgsm
from lightning_advknn.attacks.minimum_norm import minimum_norm
from lightning_advknn.attacks.precision import Precision
from lightning_advknn.attacks.settings import Attack, AttackSettings, Target

__all__ = [
    "Attack",
    "AttackSettings",
    "LogitsFn",
    "Precision",
    "Target",
    "bim",
    "credible",
    "fgsm",
    "minimum_norm",
]
