"""The pictures that an experiment leaves (Figures 3 and 6)."""

from collections.abc import Mapping
from pathlib import Path

from lightning_advknn.evaluation import Rows
from lightning_advknn.experiment.rechecks import PICTURED, telling_rows
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.reports.paper.chosen_images import IMAGES, eps_of, growing_attacks, pick
from lightning_advknn.reports.paper.image_figures import Column, adversarials_figure, neighbours_figure
from lightning_advknn.reports.render.style import save_figure


def draw(run: ExperimentRun, method: str, rows: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Picture what attacks do to some images.

    Args:
        run: The experiment.
        method: What was attacked.
        rows: Its rows by attack, first those of ``clean`` images.
        folder: Of the pictures.

    Returns:
        Files: ``neighbours.png`` and ``.pdf`` of the last attack and, if one function has several eps,
        ``adversarials.png`` and ``.pdf``.
    """
    attack = list(rows)[-1]
    place = f"{run.data.name}, seed {run.experiment.seed}"
    chosen = telling_rows(rows[attack], PICTURED)
    figure = neighbours_figure(
        run.neighbours(method, attack, chosen),
        run.attacked.layer,
        run.data.split("train").images,
        run.images_of(method, attack, chosen),
        pick(rows[attack], chosen),
        f"{place}: {attack} through {method}",
    )
    files = save_figure(figure, folder / "neighbours")
    names = growing_attacks(run.experiment, rows)
    if names:
        chosen = telling_rows(rows[names[-1]], IMAGES)
        columns = [Column("clean", run.images_of(method, names[0], chosen)[0], pick(rows["clean"], chosen))]
        for name in names:
            heading = f"eps {eps_of(run.experiment, name):g}\nL2 {rows[name]['l2'].mean():.2f}"
            images = run.images_of(method, name, chosen)[1]
            columns.append(Column(heading, images, pick(rows[name], chosen)))
        function = run.experiment.attacks[names[0]].function
        figure = adversarials_figure(columns, f"{place}: {function} through {method}")
        files += save_figure(figure, folder / "adversarials")
    return files
