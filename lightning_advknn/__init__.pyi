from .attacks import (
    AttackSettings,
    ask,
    bim,
    credible,
    fgsm,
    kernel_knn,
    minimum_norm,
    qp,
    sitawarin_wagner_baseline,
    sitawarin_wagner_knn,
    sitawarin_wagner_l2,
    sitawarin_wagner_linf,
    sitawarin_wagner_mean,
    sitawarin_wagner_minimum_norm,
    soft_nearest,
)
from .classifiers import DkNN

__version__: str
__all__ = [
    "AttackSettings",
    "DkNN",
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
