"""Claims, rankings and _fits against numbers worked by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_advknn.reports.paper import findings
from lightning_advknn.reports.paper.curve_areas import (
    _fits,
    fit_sentence,
    ranking,
    strongest_at,
    weight_sentence,
)
from lightning_advknn.reports.paper.differences import subset_sentences
from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.over_seeds import Results, load


@pytest.fixture
def read(tmp_path: Path, folders: ModuleType) -> Callable[..., Results]:
    """Writes a folder and reads it back."""

    def write_and_read(name: str, accuracy: Callable[..., float], **options: Any) -> Results:
        data, part, *variation = name.split("/")
        folder = tmp_path.joinpath(data, *([] if part == "tables" else [part, *variation]))
        own = folders.settings(
            data, **{k: options.pop(k) for k in ("methods", "attacks", "k") if k in options}
        )
        folders.write_results(folder, own, accuracy, **options)
        return load(folders.plan_of([name]), tmp_path)[0]

    return write_and_read


def by_method(**accuracies: float) -> Callable[..., float]:
    return lambda victim, method, attack, seed: 99.0 if attack == "clean" else accuracies[method]


@pytest.mark.parametrize(("dnn", "holds"), [(99.67, True), (98.67, True), (99.68, False), (98.66, False)])
def test_half_a_point(read: Callable[..., Results], dnn: float, holds: bool) -> None:
    others = {"knn": 98.98, "dknn": 98.89, "dknnb": 98.75, "dknnb_cl": 98.75}
    found = findings.clean_accuracies_agree(
        read("mnist/tables", lambda v, m, a, s: {"dnn": dnn, **others}[v])
    )
    assert found is not None
    assert found.holds is holds
    assert found.detail.startswith(f"DNN {dnn - 99.17:+.2f}; kNN +0.00")


def test_seed_means_decide_the_order(read: Callable[..., Results]) -> None:
    # Seed 1 alone is in another order; the means 40, 30, 20 are not.
    accuracy = {
        "origin": (60.0, 20.0),
        "dknnb": (30.0, 30.0),
        "dknnb_cl": (0.0, 40.0),
    }
    results = read("mnist/tables", lambda v, m, a, s: accuracy[m][s], seeds=(0, 1))
    found = findings.ordering(results)
    assert len(found) == 4  # two victims, two attacks
    assert all(each.holds and each.detail == "40.00 > 30.00 > 20.00" for each in found)


def test_what_is_out_of_order_is_said_with_its_size(read: Callable[..., Results]) -> None:
    found = findings.ordering(read("mnist/tables", by_method(origin=20.0, dknnb=10.0, dknnb_cl=11.0)))
    assert not any(each.holds for each in found)
    error = 100 * math.sqrt(0.105 * 0.895 / 9250 + 0.105 * 0.895 / 9250)  # .45 points
    assert (
        f"DkNNB+CL is 1.00 points above DkNNB, more than twice the standard error ({error:.2f})"
        in found[0].detail
    )
    equal = findings.ordering(read("mnist/tables", by_method(origin=20.0, dknnb=10.0, dknnb_cl=10.0)))
    assert "DkNNB+CL and DkNNB are equal" in equal[0].detail
    assert not equal[0].holds


def test_the_papers_own_row_may_be_out_of_order(read: Callable[..., Results]) -> None:
    found = findings.ordering(read("fashion_mnist/tables", by_method(origin=6.0, dknnb=9.0, dknnb_cl=7.0)))
    told = {each.claim: "paper's own" in each.detail for each in found}
    assert [claim for claim, own in told.items() if own] == [
        "Table 2, Fashion-MNIST: Origin > DkNNB > DkNNB+CL in kNN accuracy under BIM at eps 0.25"
    ]


def test_layers_rank_by_area(read: Callable[..., Results], folders: ModuleType) -> None:
    methods = {**folders.ORIGIN, "deep": folders.surrogate("relu3"), "early": folders.surrogate("relu1")}
    attacks = {"weak": folders.attack("bim", 0.1), "strong": folders.attack("bim", 0.2)}
    accuracies = {
        "origin": {"clean": 100.0, "weak": 80.0, "strong": 60.0},
        "deep": {"clean": 100.0, "weak": 50.0, "strong": 0.0},
        "early": {"clean": 100.0, "weak": 80.0, "strong": 40.0},
    }
    distortions = {"origin": (2.0, 4.0), "deep": (2.0, 4.0), "early": (1.0, 3.0)}
    results = read(
        "mnist/layers",
        lambda victim, method, attack, seed: accuracies.get(method, {}).get(attack, 99.0),
        methods=methods,
        attacks=attacks,
        l2=lambda method, attack: distortions[method][attack == "strong"],
    )
    ranks, end = ranking(results, "knn")
    assert end == 3.0  # as far as "early" goes
    # Trapezia: deep (100+50)/2*2 + (50+25)/2; early (100+80)/2 + (80+40)/2*2; origin (100+80)/2*2 + (80+70)/2.
    expected = {"deep": 187.5 / 3, "early": 210 / 3, "origin": 255 / 3}
    assert {rank.method.name: pytest.approx(rank.area) for rank in ranks} == expected
    assert [rank.method.name for rank in ranks] == ["deep", "early", "origin"]
    assert [rank.half for rank in ranks] == [2.0, pytest.approx(1 + 2 * 30 / 40), None]
    strongest = strongest_at(results, "knn", 2.5)  # between 50 and 0 on a line; "early" is at 50
    assert strongest is not None
    assert (strongest[0].name, strongest[1]) == ("deep", 37.5)
    assert strongest_at(results, "knn", 4.1) is None
    best = findings.best_layer(results)
    assert best is not None
    assert best.holds
    assert best.detail.endswith("relu3, relu1")


def test_eps_that_fits_best(read: Callable[..., Results], folders: ModuleType) -> None:
    # FGSM at .1 is 1 point off in each cell, at .2 3 points; BIM is 2 and 0 points off.
    off = {"a": 1.0, "b": -3.0, "c": 2.0, "d": 0.0}
    attacks = {
        name: folders.attack(function, eps)
        for name, function, eps in (
            ("a", "fgsm", 0.1),
            ("b", "fgsm", 0.2),
            ("c", "bim", 0.1),
            ("d", "bim", 0.2),
        )
    }

    def accuracy(victim: str, method: str, attack: str, seed: int) -> float:
        if attack == "clean":
            return 90.0
        theirs = published.accuracy_at_any_settings(
            "FashionMNIST", victim, method, attacks[attack]["function"]
        )
        assert theirs is not None
        return theirs + off[attack]

    results = read("fashion_mnist/eps", accuracy, attacks=attacks)
    found = _fits(results)
    assert found == {
        "fgsm": [(0.1, pytest.approx(1.0)), (0.2, pytest.approx(3.0))],
        "bim": [(0.2, pytest.approx(0.0, abs=1e-9)), (0.1, pytest.approx(2.0))],
    }
    assert "FGSM eps 0.1 (root mean square difference 1.00 points, next 0.2 with 3.00" in fit_sentence(
        results
    )
    assert "BIM eps 0.2 (root mean square difference 0.00 points" in fit_sentence(results)
    # Both: sqrt((1 + 4) / 2) at .1, sqrt((9 + 0) / 2) at .2.
    assert (
        "one eps for all attacks 0.1 (root mean square difference 1.58 points, next 0.2 with 2.12"
        in fit_sentence(results)
    )
    assert fit_sentence(read("digits/eps", lambda *_: 50.0)) == ""


def test_lambda_that_brings_victims_lowest(read: Callable[..., Results], folders: ModuleType) -> None:
    weights = {"a": 0.0, "b": 0.3, "c": 3.0}
    methods = {
        **folders.ORIGIN,
        **{name: folders.surrogate(cls_weight=weight) for name, weight in weights.items()},
    }
    accuracies = {"knn": {"a": 9.0, "b": 5.0, "c": 7.0}, "dknn": {"a": 9.0, "b": 8.0, "c": 7.5}}
    results = read(
        "mnist/cls_weight",
        lambda victim, method, attack, seed: accuracies.get(victim, {}).get(method, 1.0),
        methods=methods,
        attacks={"bim": folders.attack("bim", 0.1)},
    )
    assert weight_sentence([results]) == (
        "Lowest accuracy, by lambda: kNN under BIM 5.00 % at 0.3; DkNN under BIM 7.50 % at 3 (8.00 % at .3)."
    )


def test_gains_at_each_k(read: Callable[..., Results]) -> None:
    found = [
        read("mnist/neighbours/k=5", by_method(origin=30.0, dknnb=20.0, dknnb_cl=10.0), k=5),
        read("mnist/neighbours/k=75", by_method(origin=30.0, dknnb=20.0, dknnb_cl=30.5), k=75),
    ]
    claims = findings.growing_k(found)
    assert len(claims) == 4
    assert {claim.detail for claim in claims} == {"points more: +20.00 at k = 5, -0.50 at k = 75"}
    assert not any(claim.holds for claim in claims)
    assert all(claim.holds for claim in findings.growing_k(found[:1]))


def test_transfer(tmp_path: Path, folders: ModuleType) -> None:
    folder = tmp_path / "mnist" / "transfer"
    folders.write_results(folder, folders.settings(), lambda *_: 50.0)
    worse = {("dnn", "dknnb_cl", "bim"): 47.55}
    folders.write_table3(
        folder, lambda v, m, a: worse.get((v, m, a), 40.0 if m == "dknnb_cl" else 47.46), folders.METHODS
    )
    (results,) = load(folders.plan_of(["mnist/transfer"]), tmp_path)
    fgsm, bim = findings.transfer(results, "lenet5")
    assert (fgsm.holds, bim.holds) == (True, False)
    assert "transfers better to LeNet5 than Origin" in fgsm.claim
    assert bim.detail == "DNN 47.46 to 47.55 %; kNN 47.46 to 40.00 %; DkNN 47.46 to 40.00 %"


def test_parts_of_few_images_say_how_far_they_are_from_all(tmp_path: Path, folders: ModuleType) -> None:
    # Seed 0 has both; of all, seed 1 would shift the mean by 10 points if it counted.
    own = folders.settings("mnist")
    folders.write_results(tmp_path / "mnist", own, lambda v, m, a, seed: 30.0 + 20 * seed, seeds=(0, 1))
    few = lambda victim, method, attack, seed: {"fgsm": 27.5, "clean": 10.0}.get(attack, 30.0)  # noqa: E731
    folders.write_results(tmp_path / "mnist/neighbours/k=75", own | {"images": 1000}, few)
    other_k = folders.settings("mnist", k=5) | {"images": 1000}
    folders.write_results(tmp_path / "mnist/neighbours/k=5", other_k, lambda v, m, a, s: 0.0)
    plan = folders.plan_of(["mnist/tables", "mnist/neighbours/k=75", "mnist/neighbours/k=5"])
    (sentence,) = subset_sentences(load(plan, tmp_path))
    assert sentence.startswith("MNIST: parts that attack the first")
    # Two victims, three methods, two attacks; clean images do not count, nor does another k.
    assert "Of 12 cells" in sentence
    assert sentence.endswith("kNN, Origin, FGSM: 27.50 % of them, 30.00 % of all.")
    assert subset_sentences(load(folders.plan_of(["mnist/tables"]), tmp_path)) == []
