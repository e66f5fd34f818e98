"""Published numbers: the paper's own tables, accuracies in %, and what others report of the same victims."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Table 1: data set -> classifier. The paper does not say whether its DkNNB was trained with CL.
CLEAN_ACCURACIES: dict[str, dict[str, float]] = {
    "MNIST": {"dnn": 99.17, "knn": 98.98, "dknn": 98.89, "dknnb": 98.75},
    "SVHN": {"dnn": 89.93, "knn": 88.37, "dknn": 90.35, "dknnb": 88.32},
    "FashionMNIST": {"dnn": 91.22, "knn": 89.87, "dknn": 90.28, "dknnb": 89.23},
}

# Table 2: data set -> victim -> method -> clean, FGSM, BIM.
_TABLE2 = {
    "MNIST": {
        "knn": {
            "origin": (98.98, 44.48, 2.14),
            "dknnb": (98.98, 15.79, 1.42),
            "dknnb_cl": (98.98, 15.28, 1.03),
        },
        "dknn": {
            "origin": (98.89, 54.90, 16.80),
            "dknnb": (98.89, 28.57, 6.49),
            "dknnb_cl": (98.89, 28.08, 5.97),
        },
    },
    "SVHN": {
        "knn": {
            "origin": (88.37, 23.59, 15.26),
            "dknnb": (88.37, 19.05, 12.87),
            "dknnb_cl": (88.37, 16.37, 9.28),
        },
        "dknn": {
            "origin": (90.35, 28.60, 17.90),
            "dknnb": (90.35, 22.89, 13.98),
            "dknnb_cl": (90.35, 19.94, 10.23),
        },
    },
    "FashionMNIST": {
        "knn": {
            "origin": (89.87, 23.23, 5.82),
            "dknnb": (89.87, 17.85, 9.66),
            "dknnb_cl": (89.87, 11.87, 7.54),
        },
        "dknn": {
            "origin": (90.28, 31.65, 16.28),
            "dknnb": (90.28, 30.38, 14.87),
            "dknnb_cl": (90.28, 24.65, 12.88),
        },
    },
}

# Table 3, LeNet5 on MNIST: method -> attack -> accuracies. Its clean accuracies are not stated.
_TABLE3 = {
    "origin": {
        "fgsm": {"dnn": 68.42, "knn": 75.06, "dknn": 81.41},
        "bim": {"dnn": 47.46, "knn": 59.72, "dknn": 72.61},
    },
    "dknnb_cl": {
        "fgsm": {"dnn": 56.06, "knn": 64.97, "dknn": 75.70},
        "bim": {"dnn": 47.55, "knn": 56.37, "dknn": 70.04},
    },
}

# Figure 4 and abstract: DkNN accuracy in % and mean L2. The paper's own L2 is in its code's unit
# (see `true_l2`); that of Sitawarin & Wagner (2019), beside it in the same figure, is true L2.
OWN_POINT = (5.71, 1.4909)
SITAWARIN_WAGNER = (17.44, 3.476)
# Figure 5: share in % with a credibility below .5, of clean images and of adversarials at a mean L2 in
# that unit.
FILTERED_CLEAN = 47.54
FILTERED = (71.42, 0.3)
# Section 4.2: mean credibility of adversarials, and mean L2 in units as above.
CREDIBILITY = (0.4608, 3.005)
SITAWARIN_WAGNER_CREDIBILITY = (0.1037, 3.476)


class Published(NamedTuple):
    """A published result of an attack on a victim on MNIST, with k = 75, four layers and cosine distance."""

    source: str
    victim: str
    """``knn`` or ``dknn``."""
    entry: str
    """The same attack here, as a leaderboard names it."""
    norm: str
    eps: float
    accuracy: float
    l2: float | None = None
    """Mean true L2."""
    credibility: float | None = None
    """Mean of successes, convention ``ge``."""


# Sitawarin & Wagner (2019), by Linf eps, and their baseline.
_SITAWARIN_WAGNER_LINF = {
    0.05: (96.14, 0.068),
    0.1: (84.15, 0.071),
    0.15: (53.24, 0.079),
    0.2: (17.44, 0.104),
    0.25: (2.10, 0.150),
    0.3: (0.0, 0.181),
}
_PUBLISHED: tuple[Published, ...] = (
    *(
        Published(
            "Sitawarin & Wagner 2019",
            "dknn",
            "sitawarin_wagner_published, dknn",
            "linf",
            eps,
            accuracy,
            3.476 if eps == 0.2 else None,
            credibility,
        )
        for eps, (accuracy, credibility) in _SITAWARIN_WAGNER_LINF.items()
    ),
    Published("their baseline", "dknn", "sitawarin_wagner_baseline, dknn", "l2", 3.476, 50.04, 3.436),
    *(
        Published(
            f"AdvKNN, {method} {attack.upper()}",
            victim,
            f"{attack}, {kind}",
            "linf",
            0.25,
            cells[kind][place],
        )
        for victim, cells in _TABLE2["MNIST"].items()
        for kind, method in (("origin", "Origin"), ("dknnb_cl", "DkNNB + CL"))
        for place, attack in ((1, "fgsm"), (2, "bim"))
    ),
)


# Settings of the attacks in Tables 2 and 3. The victims have k = 75 and cosine distance; the kNN is on
# the third layer. The paper does not state Fashion-MNIST's settings: its cells are compared with any.
_ATTACKS: dict[str, dict[str, dict[str, float]]] = {
    "MNIST": {"fgsm": {"eps": 0.25}, "bim": {"eps": 0.25, "step_size": 0.01, "steps": 100}},
    "SVHN": {"fgsm": {"eps": 0.05}, "bim": {"eps": 0.05, "step_size": 0.005, "steps": 20}},
}
_VICTIM = {"layer": "relu3", "layers": None, "k": 75, "metric": "cosine"}


def clean_accuracy(data: str, classifier: str, victim: Mapping[str, Any]) -> float | None:
    """A cell of Table 1 in %; None where the paper has none or other victims.

    Args:
        data: Name of the data set.
        classifier: ``dnn``, ``knn``, ``dknn`` or a surrogate's name.
        victim: The victims' settings.
    """
    if classifier != "dnn" and not _is_papers(victim):
        return None
    return CLEAN_ACCURACIES.get(data, {}).get("dknnb" if classifier == "dknnb_cl" else classifier)


def accuracy_under_attack(
    data: str,
    victim: str,
    method: str,
    attack: str,
    settings: Mapping[str, float],
    victim_settings: Mapping[str, Any],
) -> float | None:
    """A cell of Table 2 in %; None where the paper has none or other settings.

    Args:
        data: Name of the data set.
        victim: ``knn`` or ``dknn``.
        method: What was differentiated.
        attack: ``clean``, ``fgsm`` or ``bim``.
        settings: The attack's.
        victim_settings: The victims'.
    """
    if not _are_papers(data, attack, settings, victim_settings):
        return None
    return accuracy_at_any_settings(data, victim, method, attack)


def accuracy_at_any_settings(data: str, victim: str, method: str, attack: str) -> float | None:
    """A cell of Table 2 in %, whatever its settings; None if there is none.

    Arguments as in `accuracy_under_attack`.
    """
    cell = _TABLE2.get(data, {}).get(victim, {}).get(method)
    attacks = ("clean", "fgsm", "bim")
    return None if cell is None or attack not in attacks else cell[attacks.index(attack)]


def accuracy_on_transfer(
    data: str,
    network: str,
    victim: str,
    method: str,
    attack: str,
    settings: Mapping[str, float],
    victim_settings: Mapping[str, Any],
) -> float | None:
    """A cell of Table 3 in %; None where the paper has none or other settings.

    Args:
        data: Name of the data set.
        network: The transfer network; the paper's is ``lenet5``.
        victim: ``dnn``, ``knn`` or ``dknn``, on that network.
        method: What was differentiated.
        attack: ``fgsm`` or ``bim``.
        settings: The attack's.
        victim_settings: The attacked victims'. The paper does not say which layer of LeNet5 its kNN is on.
    """
    if (data, network) != ("MNIST", "lenet5") or not _are_papers(data, attack, settings, victim_settings):
        return None
    return _TABLE3.get(method, {}).get(attack, {}).get(victim)


def published_of(data: str, victim: str, victim_settings: Mapping[str, Any]) -> list[Published]:
    """Published results of a victim; none if its settings differ.

    Args:
        data: Name of the data set.
        victim: ``knn`` or ``dknn``.
        victim_settings: The victims'.
    """
    if data != "MNIST" or not _is_papers(victim_settings):
        return []
    return [each for each in _PUBLISHED if each.victim == victim]


def true_l2(l2: float) -> float:
    """True L2 of a value that the authors' code printed for 28 x 28 images: L2 * 255 / 784."""
    return l2 * 784 / 255


def _are_papers(
    data: str, attack: str, settings: Mapping[str, float], victim_settings: Mapping[str, Any]
) -> bool:
    """Whether an attack's and the victims' settings are the paper's, as far as it states them."""
    theirs = _ATTACKS.get(data, {}).get(attack)
    return _is_papers(victim_settings) and (theirs is None or dict(settings) == theirs)


def _is_papers(victim: Mapping[str, Any]) -> bool:
    return all(victim.get(name) == value for name, value in _VICTIM.items())
