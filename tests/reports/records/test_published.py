"""The paper's numbers, typed again."""

import pytest

from lightning_advknn.reports.records import published

VICTIM = {"layer": "relu3", "k": 75, "metric": "cosine"}


BIM = {"eps": 0.25, "step_size": 0.01, "steps": 100}


def test_the_papers_numbers() -> None:
    """Against cells of the paper's Tables 1 and 2, typed again."""
    assert published.clean_accuracy("SVHN", "dknn", VICTIM) == 90.35
    assert (
        published.clean_accuracy("FashionMNIST", "dknnb_cl", VICTIM)
        == published.clean_accuracy("FashionMNIST", "dknnb", VICTIM)
        == 89.23
    )
    assert published.accuracy_under_attack("SVHN", "dknn", "dknnb", "fgsm", {"eps": 0.05}, VICTIM) == 22.89
    assert (
        published.accuracy_under_attack("FashionMNIST", "knn", "origin", "bim", {"eps": 0.1}, VICTIM) == 5.82
    )
    assert published.accuracy_under_attack("MNIST", "dknn", "origin", "clean", {}, VICTIM) == 98.89
    for data, method, attack in (
        ("Digits", "origin", "bim"),
        ("MNIST", "mine", "bim"),
        ("MNIST", "origin", "cw"),
    ):
        assert published.accuracy_under_attack(data, "knn", method, attack, BIM, VICTIM) is None
    assert published.clean_accuracy("Digits", "dnn", VICTIM) is None
    assert published.accuracy_at_any_settings("MNIST", "dknn", "origin", "bim") == 16.8
    assert published.true_l2(1.4909) == pytest.approx(4.58, abs=0.005)


def test_other_settings_have_no_paper_cell() -> None:
    cell = ("MNIST", "knn", "origin", "bim")
    assert published.accuracy_under_attack(*cell, BIM, VICTIM) == 2.14
    assert published.accuracy_under_attack(*cell, BIM | {"steps": 50}, VICTIM) is None
    for change in ({"k": 5}, {"metric": "euclidean"}, {"layer": "relu1"}):
        assert published.accuracy_under_attack(*cell, BIM, VICTIM | change) is None
        assert published.clean_accuracy("MNIST", "knn", VICTIM | change) is None
        assert published.clean_accuracy("MNIST", "dnn", VICTIM | change) == 99.17


def test_the_papers_table3() -> None:
    """Against cells of the paper's Table 3, typed again."""
    fgsm = {"eps": 0.25}
    assert published.accuracy_on_transfer("MNIST", "lenet5", "dnn", "origin", "fgsm", fgsm, VICTIM) == 68.42
    assert published.accuracy_on_transfer("MNIST", "lenet5", "knn", "dknnb_cl", "fgsm", fgsm, VICTIM) == 64.97
    cell = ("MNIST", "lenet5", "dknn", "origin", "bim")
    assert published.accuracy_on_transfer(*cell, BIM, VICTIM) == 72.61
    assert published.accuracy_on_transfer(*cell, BIM | {"eps": 0.3}, VICTIM) is None
    assert published.accuracy_on_transfer(*cell, BIM, VICTIM | {"k": 5}) is None
    for place, other in ((0, "FashionMNIST"), (1, "resnet"), (3, "dknnb"), (4, "clean")):
        changed = [*cell[:place], other, *cell[place + 1 :]]
        assert published.accuracy_on_transfer(*changed, BIM, VICTIM) is None
