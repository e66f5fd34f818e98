"""The paper's own numbers: accuracies in %."""

# Table 1: data set -> classifier. The paper does not say whether its DkNNB was trained with CL.
TABLE1: dict[str, dict[str, float]] = {
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


def table1(data: str, classifier: str) -> float | None:
    """Clean accuracy in %, None where the paper has none."""
    return TABLE1.get(data, {}).get("dknnb" if classifier == "dknnb_cl" else classifier)


def table2(data: str, victim: str, method: str, attack: str) -> float | None:
    """Accuracy in % under an attack (``clean``, ``fgsm``, ``bim``), None where the paper has none."""
    cell = _TABLE2.get(data, {}).get(victim, {}).get(method)
    attacks = ("clean", "fgsm", "bim")
    return cell[attacks.index(attack)] if cell and attack in attacks else None
