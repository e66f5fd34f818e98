"""Attacks on logits or victims: functions ``attack(target, images, labels, *, settings) -> adversarial``.

``__init__.pyi`` lists them. They are imported at their first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
