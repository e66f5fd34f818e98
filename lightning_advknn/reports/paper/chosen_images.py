"""Which attacks the picture of growing perturbations shows (Figure 6)."""

from collections.abc import Collection, Sequence

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.settings import Experiment

IMAGES, _COLUMNS = 5, 8  # rows and attacked columns of Figure 6


def growing_attacks(experiment: Experiment, among: Collection[str]) -> list[str]:
    """Attacks by one function with growing eps, the last function with several; none if there is none.

    Of more than `_COLUMNS`, as many, evenly spaced.
    """
    by_function: dict[str, dict[float, str]] = {}
    for name, attack in experiment.attacks.items():
        if name in among and "eps" in attack.settings:  # minimum-norm attacks have none
            by_function.setdefault(attack.function, {})[eps_of(experiment, name)] = name
    growing = [names for names in by_function.values() if len(names) > 1]
    if not growing:
        return []
    names = [growing[-1][eps] for eps in sorted(growing[-1])]
    shown = min(len(names), _COLUMNS)
    return [names[round(place * (len(names) - 1) / (shown - 1))] for place in range(shown)]


def eps_of(experiment: Experiment, attack: str) -> float:
    """Radius of an attack that has one."""
    return float(experiment.attacks[attack].settings["eps"])


def pick(rows: Rows, positions: Sequence[int]) -> Rows:
    """Some of the rows."""
    return {name: column[positions] for name, column in rows.items()}
