"""The pictures show the images, neighbours and verdicts that they should."""

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import Rows, judge, make_rows
from lightning_advknn.experiment.rechecks import neighbours
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.reports.paper.chosen_images import growing_attacks
from lightning_advknn.reports.paper.image_figures import (
    Column,
    adversarials_figure,
    neighbours_figure,
)
from lightning_advknn.search.build import BankSettings, build_banks

MARK = "\N{BALLOT X}"
NEIGHBOURS = 5  # of each image, in each layer
TITLE = "FashionMNIST, seed 10: bim_050 through dknnb_cl_logits"  # as long as they get


def shown(axes: Axes) -> Tensor:
    """The image in axes, ``(H, W)``."""
    return torch.tensor(axes.images[0].get_array().data)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def check_print(figure: Figure) -> None:
    """All text is at least 7 pt, and nothing leaves the page."""
    figure.canvas.draw()
    for text in figure.findobj(Text):
        if text.get_text():
            assert text.get_fontsize() >= 7
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


def test_neighbours_at_each_layer_are_those_of_brute_force(device: torch.device) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    linear = nn.Linear(16, 4)
    network = FeatureNetwork(nn.Sequential(nn.Flatten(), linear), ["0", "1"]).eval().to(device)
    batch = Batch(images, labels, torch.arange(40))
    dknn = DkNN.on_banks(network, build_banks(network, [batch], 4, BankSettings("euclidean")), k=3).to(device)
    dknn.calibrate([batch])
    clean, adversarial = torch.rand(2, 1, 4, 4, device=device), torch.rand(2, 1, 4, 4, device=device)
    rows = make_rows(
        torch.arange(2),
        torch.tensor([1, 2]),
        clean.cpu(),
        adversarial.cpu(),
        *(type(v)(*(c.cpu() for c in v)) for v in (judge(dknn, "0", clean), judge(dknn, "0", adversarial))),
    )
    found = neighbours(dknn, torch.cat([clean, adversarial]))
    by_layer = {
        layer: (found[f"rows/{layer}"].cpu(), found[f"labels/{layer}"].cpu()) for layer in dknn.layers
    }
    figure = neighbours_figure(by_layer, "0", images, (clean, adversarial), rows, TITLE)
    check_print(figure)
    # Per sample: clean image, difference, adversarial; then for each layer the neighbours of the one and the other.
    axes, per_sample = figure.axes, 3 + 2 * 2 * NEIGHBOURS
    assert len(axes) == 2 * per_sample

    @torch.no_grad()
    def features(layer: int, images: Tensor) -> Tensor:
        flat = images.flatten(1).double()
        return linear.cpu().double()(flat) if layer else flat

    marks = 0
    for sample, label in enumerate((1, 2)):
        block = axes[sample * per_sample : (sample + 1) * per_sample]
        pair = [clean[sample].cpu(), adversarial[sample].cpu()]
        expected = [pair[0][0], (pair[1] - pair[0])[0], pair[1][0]]
        assert all(torch.equal(shown(a), image) for a, image in zip(block, expected, strict=False))
        for place, axis in enumerate(block[3:]):
            layer, (side, rank) = place // (2 * NEIGHBOURS), divmod(place % (2 * NEIGHBOURS), NEIGHBOURS)
            distances = (features(layer, images) - features(layer, pair[side][None])).norm(dim=1)
            row = int(distances.argsort()[rank])
            assert torch.equal(shown(axis), images[row, 0])
            # Wrong labels have a mark and a frame that survive without colour.
            wrong = int(labels[row]) != label
            marks += wrong
            assert axis.get_title() == (f"{labels[row]} {MARK}" if wrong else f"{labels[row]}")
            assert (axis.spines["left"].get_linewidth() > 1) == wrong
            assert (to_hex(axis.title.get_color()) != "#000000") == wrong
    assert 0 < marks < 4 * 2 * NEIGHBOURS
    told = texts(figure)
    for when in ("before", "after"):
        for victim_name, column in (("kNN", "knn"), ("DkNN", "dknn")):
            for predicted, label in zip(rows[f"{column}_{when}"], rows["label"], strict=True):
                assert f"{victim_name} {predicted}" + (f" {MARK}" if predicted != label else "") in told
        for credibility in rows[f"dknn_credibility_{when}"]:
            assert f"credibility {credibility:.2f}" in told
    for l2 in rows["l2"]:
        assert f"true L2 {l2:.2f}" in told


def test_adversarials_stand_in_their_columns_with_their_verdicts() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([3, 7])
    columns = []
    for number, heading in enumerate(("clean", "eps 0.1\nL2 1.00", "eps 0.3\nL2 2.00")):
        rows: Rows = {
            "label": labels,
            "knn_after": torch.tensor([3, 7 + number]),
            "dknn_after": torch.tensor([3 + number // 2, 7]),
            "l2": torch.tensor([number + 0.25, number + 0.5], dtype=torch.float64),
        }
        columns.append(Column(heading, torch.rand(2, 3, 4, 4), rows))
    figure = adversarials_figure(columns, TITLE)
    check_print(figure)
    assert len(figure.axes) == 6
    places = [axes.get_position() for axes in figure.axes]
    for place, column in enumerate(columns):
        for row in range(2):
            pixels = torch.tensor(figure.axes[2 * place + row].images[0].get_array().data)
            assert torch.equal(pixels.permute(2, 0, 1), column.images[row])
            assert places[2 * place + row].x0 == places[2 * place].x0
            assert places[2 * place + row].y0 == places[row].y0
    told = texts(figure)
    assert told.count("kNN 3") == 3
    assert [text for text in told if text.startswith("kNN 7")] == ["kNN 7"]
    assert f"kNN 8 {MARK}" in told
    assert f"kNN 9 {MARK}" in told
    assert (told.count("DkNN 3"), told.count(f"DkNN 4 {MARK}"), told.count("DkNN 7")) == (2, 1, 3)
    assert {"label 3", "label 7", "eps 0.3", "L2 2.00", "L2 2.25", "L2 2.50"} <= set(told)


@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        ({"a": ("fgsm", 0.1), "b": ("bim", 0.1)}, []),
        ({"a": ("fgsm", 0.1), "b": ("fgsm", 0.1)}, []),
        ({"a": ("fgsm", 0.3), "b": ("bim", 0.1), "c": ("fgsm", 0.2)}, ["c", "a"]),
        ({"a": ("fgsm", 0.3), "b": ("bim", 0.1), "c": ("fgsm", 0.2), "d": ("bim", 0.05)}, ["d", "b"]),
        # Eight of fifteen: the first, the last and each second in between.
        (
            {f"e{n}": ("fgsm", n / 100) for n in range(15)},
            [f"e{n}" for n in range(0, 15, 2)],
        ),
        # Minimum-norm attacks have no eps.
        (
            {"a": ("fgsm", 0.3), "b": ("fgsm", 0.1), "c": ("deepfool", None), "d": ("deepfool", None)},
            ["b", "a"],
        ),
    ],
)
def test_growing_attacks_are_of_one_function(
    attacks: dict[str, tuple[str, float | None]], expected: list[str]
) -> None:
    settings = {
        name: AttackSettings(function, {} if eps is None else {"eps": eps})
        for name, (function, eps) in attacks.items()
    }
    experiment = Experiment(backbone=None, surrogates={}, attacks=settings)
    assert growing_attacks(experiment, settings) == expected
    assert growing_attacks(experiment, expected[1:2]) == []  # it alone is no series
