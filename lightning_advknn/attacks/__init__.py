"""Attacks as plain functions, ``attack(target, images, labels, *, settings) -> adversarial``, on logits or on a victim.

All are imported when they are first used, as ``__init__.pyi`` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
