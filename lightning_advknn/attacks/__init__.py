"""Attacks as plain functions: ``attack(logits_fn, images, labels, **settings) -> adversarial``."""

from lightning_advknn.attacks.gradient_sign import LogitsFn, bim, fgsm
from lightning_advknn.attacks.precision import Precision
from lightning_advknn.attacks.settings import Attack, AttackSettings

__all__ = ["Attack", "AttackSettings", "LogitsFn", "Precision", "bim", "fgsm"]
