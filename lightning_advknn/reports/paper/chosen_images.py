"""Which images and attacks the pictures of an experiment show (Figures 3 and 6)."""

from collections.abc import Collection, Sequence

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment

PAIRS, IMAGES, COLUMNS = 2, 5, 8  # samples of Figure 3; rows and attacked columns of Figure 6


def telling_rows(rows: Rows, n: int) -> list[int]:
    """Positions of up to n images that both victims get right before the attack and wrong after it.

    One image of each class comes first. If there are no such images, all are taken for such.
    """
    label = rows["label"]
    right = (rows["knn_before"] == label) & (rows["dknn_before"] == label)
    wrong = (rows["knn_after"] != label) & (rows["dknn_after"] != label)
    fooled = (right & wrong).nonzero().squeeze(1).tolist() or list(range(len(label)))
    first_of_class = {int(label[position]): position for position in reversed(fooled)}
    chosen = sorted(first_of_class.values())
    return (chosen + [position for position in fooled if position not in chosen])[:n]


def growing_attacks(experiment: Experiment, among: Collection[str]) -> list[str]:
    """Attacks by one function with growing eps, the last function with several; none if there is none.

    Of more than `COLUMNS`, as many, evenly spaced.
    """
    by_function: dict[str, dict[float, str]] = {}
    for name, attack in experiment.attacks.items():
        if name in among and "eps" in attack.settings:  # minimum-norm attacks have none
            by_function.setdefault(attack.function, {})[eps_of(experiment, name)] = name
    growing = [names for names in by_function.values() if len(names) > 1]
    if not growing:
        return []
    names = [growing[-1][eps] for eps in sorted(growing[-1])]
    shown = min(len(names), COLUMNS)
    return [names[round(place * (len(names) - 1) / (shown - 1))] for place in range(shown)]


def eps_of(experiment: Experiment, attack: str) -> float:
    """Radius of an attack that has one."""
    return float(experiment.attacks[attack].settings["eps"])


def pick(rows: Rows, positions: Sequence[int]) -> Rows:
    """Some of the rows."""
    return {name: column[positions] for name, column in rows.items()}
