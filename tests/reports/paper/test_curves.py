"""Figures show the numbers they are given, with units, names and a legend."""

from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_advknn.reports.paper import curves
from lightning_advknn.reports.paper.credibility import (
    Distribution,
    distributions,
    filter_sentence,
    filter_table,
)
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import read_csv
from lightning_advknn.reports.records.over_seeds import Plan, Results, load


@pytest.fixture(scope="module")
def found(grid: tuple[Plan, Path]) -> dict[str, Results]:
    return {each.name: each for each in load(*grid)}


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each labelled line."""
    return {
        line.get_label(): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def read(results: Results, **wanted: object) -> list[tuple[float, float, int]]:
    """eps, accuracy and seed of a table's lines, read by plain means."""
    rows = read_csv(results.folder / "table2.csv")
    own = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [(float(row["eps"] or 0), float(row["accuracy"] or 0), int(row["seed"] or 0)) for row in own]


def is_readable(figure: Figure) -> None:
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = [
            axes.title,
            axes.xaxis.label,
            axes.yaxis.label,
            *axes.get_xticklabels(),
            *axes.get_yticklabels(),
        ]
        assert min(text.get_fontsize() for text in texts) >= 7
    assert min(text.get_fontsize() for text in figure.legends[0].get_texts()) >= 7
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_layers(found: dict[str, Results]) -> None:
    results = found["mnist/layers"]
    figure = curves.layers_figure(results)
    knn, dknn = figure.axes
    assert (knn.get_title(), dknn.get_title()) == ("kNN", "DkNN")
    assert knn.get_ylabel() == "accuracy (%)"
    for axes, victim in ((knn, "knn"), (dknn, "dknn")):
        assert "true L2" in axes.get_xlabel()
        assert "pixels in [0, 1]" in axes.get_xlabel()
        own = lines(axes)
        surrogates = [f"{kind}, {layer}" for layer in results.layers for kind in ("DkNNB", "DkNNB+CL")]
        assert list(own) == [*surrogates, "Origin"]
        points = read(results, victim=victim, method="relu1_cl")
        by_eps = {eps: [a for e, a, _ in points if e == eps] for eps, _, _ in points}
        means = sorted(sum(values) / len(values) for values in by_eps.values())
        assert [y for _, y in own["DkNNB+CL, relu1"]] == pytest.approx(means[::-1])
        assert own["DkNNB+CL, relu1"][0][0] == 0  # clean images
    assert sorted(legend(figure)) == sorted(lines(knn))
    # The two published points, each in true L2, named with the unit it was published in.
    published = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in dknn.lines if len(line.get_xdata()) == 1
    ]
    assert published == [(3.476, 17.44), (pytest.approx(1.4909 * 784 / 255), 5.71)]
    texts = [text.get_text().replace("\n", " ") for text in dknn.texts]
    assert texts == [
        "Sitawarin & Wagner 2019: 17.44 % at 3.476 (true L2)",
        "AdvKNN paper: 5.71 % at 1.4909 (its own unit; true L2 4.58)",
    ]
    (unit,) = dknn.child_axes
    figure.draw_without_rendering()
    assert unit.get_xlim()[1] == pytest.approx(dknn.get_xlim()[1] * 255 / 784)
    is_readable(figure)
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in knn.lines}
    assert len(styles) == 9


def test_growing_k(found: dict[str, Results]) -> None:
    at_k = [each for name, each in found.items() if name.startswith("mnist/neighbours") and each.runs]
    figure = curves.growing_k_figure(at_k[::-1])
    knn, dknn = figure.axes
    assert knn.get_ylabel() == "attack success, 100 - accuracy (%)"
    assert "neighbours" in knn.get_xlabel()
    assert [label.get_text() for label in knn.get_xticklabels()] == ["5", "25", "75", "150"]
    expected = []
    for each in at_k:
        values = [accuracy for _, accuracy, _ in read(each, victim="dknn", method="dknnb_cl", attack="fgsm")]
        expected.append((each.victim["k"], pytest.approx(100 - sum(values) / len(values))))
    assert lines(dknn)["FGSM, DkNNB+CL"] == expected
    assert legend(figure) == [
        f"{attack}, {method}" for method in ("Origin", "DkNNB", "DkNNB+CL") for attack in ("FGSM", "BIM")
    ]
    assert len({(line.get_color(), line.get_linestyle()) for line in knn.lines}) == 6
    is_readable(figure)


def test_weights(found: dict[str, Results]) -> None:
    results = found["mnist/cls_weight"]
    figure = curves.weights_figure([results])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["kNN, FGSM", "DkNN, FGSM", "kNN, BIM", "DkNN, BIM"]
    axes = panels["DkNN, BIM"]
    names = {
        0.0: "cl_0.0",
        0.03: "cl_0.03",
        0.1: "cl_0.1",
        0.3: "cl_0.3",
        1.0: "cl_1.0",
        3.0: "cl_3.0",
        10.0: "dknnb_cl",
    }
    expected = [
        (w, read(results, victim="dknn", method=name, attack="bim")[0][1]) for w, name in names.items()
    ]
    assert lines(axes)["DkNNB+CL"] == [(w, pytest.approx(a)) for w, a in expected]
    level = read(results, victim="dknn", method="origin", attack="bim")[0][1]
    assert {y for _, y in lines(axes)["Origin"]} == {level}
    assert "no unit" in axes.get_xlabel()
    is_readable(figure)
    for panel in figure.axes:  # 0 is on the axis, and no line is outside
        low, high = panel.get_ylim()
        assert panel.get_xlim()[0] < 0
        assert all(low <= y <= high for points in lines(panel).values() for _, y in points)


def test_eps(found: dict[str, Results]) -> None:
    results = found["fashion_mnist/eps"]
    figure = curves.eps_figure(results)
    panels = {axes.get_title(): axes for axes in figure.axes}
    for (title, axes), victim in zip(panels.items(), ("knn", "dknn") * 2, strict=True):
        own = lines(axes)
        for method, name in (("origin", "Origin"), ("dknnb", "DkNNB"), ("dknnb_cl", "DkNNB+CL")):
            theirs = published.accuracy_at_any_settings(
                "FashionMNIST", victim, method, title.split(", ")[1].lower()
            )
            assert {y for _, y in own[f"{name}, the paper's"]} == {theirs}
            assert [x for x, _ in own[name]] == [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert "pixels in [0, 1]" in panels["kNN, BIM"].get_xlabel()
    assert panels["kNN, BIM"].get_ylabel() == "accuracy (%)"
    is_readable(figure)


def test_credibility_below_a_threshold_by_hand() -> None:
    # Ten images: thresholds filter what is below them, not what is at them.
    some = Distribution("some", 1.0, {0.0: 2, 0.5: 3, 0.9: 5})
    assert (some.n, some.mean) == (10, pytest.approx(0.6))
    assert [some.below(t) for t in (0.0, 0.1, 0.5, 0.6, 0.9, 1.0)] == [0, 20, 20, 50, 50, 100]
    figure = curves.credibility_figure([Distribution("clean", 0.0, {1.0: 1}), some], "strict")
    left, right = figure.axes
    (line,) = [line for line in left.lines if line.get_label() == "some: L2 1.00"]
    assert line.get_drawstyle() == "steps-pre"
    assert lines(left)["some: L2 1.00"] == [(0, 0), (0, 0), (0.5, 20), (0.9, 50), (1, 100)]
    assert list(lines(right)) == ["clean"]
    assert "convention: strict" in left.get_xlabel()
    assert left.get_ylabel() == "images below the threshold (%)"
    assert legend(figure) == ["clean", "some: L2 1.00"]


def test_credibility_of_a_folder(tmp_path: Path, folders: ModuleType) -> None:
    bim = {"weak": folders.attack("bim", 0.05), "strong": folders.attack("bim", 0.2)}
    own = folders.settings(attacks=bim)
    credibility = {
        "origin/clean": {"dknn": {"all": [[0.4, 1], [0.8, 3]], "success": []}},
        "dknnb_cl/weak": {"dknn": {"all": [[0.2, 3], [0.5, 1]], "success": [[0.2, 1]]}},
        "dknnb_cl/strong": {"dknn": {"all": [[0.1, 4]], "success": [[0.1, 4]]}},
        "dknnb/weak": {"dknn": {"all": [[1.0, 4]], "success": []}},
    }
    folder = tmp_path / "mnist" / "layers"
    distortion = {"weak": 0.9, "strong": 3.6}
    folders.write_results(
        folder, own, lambda *_: 50.0, (0, 1), lambda m, a: distortion[a], credibility=credibility
    )
    (results,) = load(folders.plan_of(["mnist/layers"]), tmp_path)
    found = distributions(results)
    assert [(each.label, each.l2, each.successes, each.n) for each in found] == [
        ("clean", 0.0, False, 8),  # two seeds of four images
        ("BIM, eps 0.05", 0.9, False, 8),
        ("BIM, eps 0.05", 0.9, True, 2),
        ("BIM, eps 0.2", 3.6, False, 8),
        ("BIM, eps 0.2", 3.6, True, 8),
    ]
    told = filter_sentence(results, found)
    # At a true L2 nearest to .3 * 784 / 255 = .92: 3 of 4 below .5, as are 1 of 4 clean images.
    assert told.startswith(
        "A threshold of .5 filters 75.00 % of adversarials at a mean true L2 of 0.90 and 25.00 %"
    )
    assert "71.42 % at 0.3, which is a true L2 of 0.92" in told
    table = filter_table(results, found)
    half = table.header.index("0.5")
    ours = [("25.00",), ("75.00",), ("100.00",), ("100.00",), ("100.00",)]
    assert [row[half] for row in table.rows] == [*ours, ("47.54",), ("71.42",), ("",), ("",)]
    mean = table.header.index("mean credibility")
    assert [row[mean] for row in table.rows][-2:] == [("0.4608",), ("0.1037",)]
