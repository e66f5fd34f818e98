"""Attacks as plain functions: ``attack(logits_fn, images, labels, **settings) -> adversarial``."""

from lightning_advknn.attacks.gradient_sign import LogitsFn, bim, fgsm

__all__ = ["LogitsFn", "bim", "fgsm"]
