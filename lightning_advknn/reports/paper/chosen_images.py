"""Which pictures an experiment gets: Figures 3 and 6."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.reports.paper.image_figures import Column, adversarials_figure, neighbours_figure
from lightning_advknn.reports.render.style import save_figure

PAIRS, IMAGES, COLUMNS = 2, 5, 8  # samples of Figure 3; rows and attacked columns of Figure 6


def draw(run: ExperimentRun, method: str, rows: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Picture what attacks do.

    Args:
        run: Whose images.
        method: What was attacked.
        rows: Its rows by attack, first those of ``clean`` images.
        folder: Where to.

    Returns:
        The files: ``neighbours.png`` and ``.pdf`` of the last attack, and ``adversarials.png`` and ``.pdf`` if one attack
        function has several eps.
    """
    attack = list(rows)[-1]
    place = f"{run.data.name}, seed {run.experiment.seed}"
    chosen = telling_rows(rows[attack], PAIRS)
    figure = neighbours_figure(
        run.attacked.dknn,
        run.attacked.layer,
        run.data.split("train").images,
        *run.images_of(method, attack, chosen),
        _pick(rows[attack], chosen),
        f"{place}: {attack} through {method}",
    )
    files = save_figure(figure, folder / "neighbours")
    names = growing_attacks(run.experiment, rows)
    if names:
        chosen = telling_rows(rows[names[-1]], IMAGES)
        columns = [Column("clean", run.images_of(method, names[0], chosen)[0], _pick(rows["clean"], chosen))]
        for name in names:
            heading = f"eps {_eps(run.experiment, name):g}\nL2 {rows[name]['l2'].mean():.2f}"
            images = run.images_of(method, name, chosen)[1]
            columns.append(Column(heading, images, _pick(rows[name], chosen)))
        function = run.experiment.attacks[names[0]].function
        figure = adversarials_figure(columns, f"{place}: {function} through {method}")
        files += save_figure(figure, folder / "adversarials")
    return files


def growing_attacks(experiment: Experiment, among: Collection[str]) -> list[str]:
    """Names of attacks by one function with growing eps: the last function that has several; none if there is none.

    Of more than `COLUMNS`, as many at even distances.
    """
    by_function: dict[str, dict[float, str]] = {}
    for name, attack in experiment.attacks.items():
        if name in among and "eps" in attack.settings:  # minimum-norm attacks have none
            by_function.setdefault(attack.function, {})[_eps(experiment, name)] = name
    growing = [names for names in by_function.values() if len(names) > 1]
    if not growing:
        return []
    names = [growing[-1][eps] for eps in sorted(growing[-1])]
    shown = min(len(names), COLUMNS)
    return [names[round(place * (len(names) - 1) / (shown - 1))] for place in range(shown)]


def telling_rows(rows: Rows, n: int) -> Sequence[int]:
    """Positions of up to n samples, one a class first, that both victims got right and both get wrong."""
    label = rows["label"]
    right = (rows["knn_before"] == label) & (rows["dknn_before"] == label)
    wrong = (rows["knn_after"] != label) & (rows["dknn_after"] != label)
    fooled = (right & wrong).nonzero().squeeze(1).tolist() or list(range(len(label)))
    first_of_class = {int(label[position]): position for position in reversed(fooled)}
    chosen = sorted(first_of_class.values())
    return (chosen + [position for position in fooled if position not in chosen])[:n]


def _eps(experiment: Experiment, attack: str) -> float:
    return float(experiment.attacks[attack].settings["eps"])


def _pick(rows: Rows, positions: Sequence[int]) -> Rows:
    return {name: column[positions] for name, column in rows.items()}
