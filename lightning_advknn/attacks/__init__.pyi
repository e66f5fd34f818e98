from .ask import ask
from .credible import credible
from .gradient_sign import bim, fgsm
from .kernel import kernel_knn
from .minimum_norm import minimum_norm
from .parts.arguments import Attack, LogitsFn, Target
from .settings import AttackSettings
from .sitawarin_wagner import sitawarin_wagner_knn, sitawarin_wagner_l2, sitawarin_wagner_linf
from .sitawarin_wagner_2020 import sitawarin_wagner_minimum_norm
from .sitawarin_wagner_heuristics import sitawarin_wagner_baseline, sitawarin_wagner_mean
from .soft_nearest import soft_nearest
from .wang import qp

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
