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
from .attacks.parts.declare import attack
from .classifiers import KNN, DkNN
from .evaluation import Evaluation, evaluate

__version__: str

__all__ = [
    "KNN",
    "AttackSettings",
    "DkNN",
    "Evaluation",
    "__version__",
    "ask",
    "attack",
    "bim",
    "credible",
    "evaluate",
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
