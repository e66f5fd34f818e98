"""Adversarial robustness of k-nearest-neighbour classifiers: AdvKNN and its evaluation.

``__init__.pyi`` lists the public names. They are imported at their first use.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
