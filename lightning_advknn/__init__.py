"""Adversarial robustness of k-nearest-neighbour classifiers: AdvKNN and its evaluation."""

__version__ = "0.1.0"
