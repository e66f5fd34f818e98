"""The norm of an attack, as it says itself or has to be told."""

import math
from typing import Any

import numpy as np
import pytest

from lightning_advknn import attacks
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.choices import Norm


@pytest.mark.parametrize(
    ("function", "settings", "norm"),
    [
        ("fgsm", {"eps": 0.1}, "linf"),
        ("bim", {"eps": 0.1}, "linf"),
        ("lightning_advknn.attacks.bim", {"eps": 0.1}, "linf"),
        ("ask", {"eps": 0.1}, "linf"),
        ("sitawarin_wagner_linf", {"eps": 0.1}, "linf"),
        ("sitawarin_wagner_l2", {"eps": 1.0}, "l2"),
        ("sitawarin_wagner_baseline", {"eps": 1.0}, "l2"),
        ("sitawarin_wagner_knn", {}, "l2"),
        ("sitawarin_wagner_mean", {}, "l2"),
        ("sitawarin_wagner_minimum_norm", {}, "l2"),
        ("kernel_knn", {}, "l2"),
        ("soft_nearest", {}, "l2"),
        ("soft_nearest", {"eps": 1.0}, "l2"),  # the radius of an L2 ball
        ("qp", {}, "l2"),
        ("minimum_norm", {}, "l2"),
        ("minimum_norm", {"norm": "linf"}, "linf"),
        ("credible", {"eps": 1.0}, "l2"),
        ("credible", {"eps": 0.1, "norm": "linf"}, "linf"),
        (f"{__name__}.by_default_linf", {}, "linf"),
        (f"{__name__}.by_default_linf", {"norm": "l2"}, "l2"),
        (f"{__name__}.by_default_linf", {"norm": "L2"}, "l2"),
        (f"{__name__}.by_default_linf", {"norm": 2}, "l2"),
        (f"{__name__}.by_default_linf", {"norm": math.inf}, "linf"),
    ],
)
def test_the_norm_of_an_attack(function: str, settings: dict[str, Any], norm: Norm) -> None:
    assert AttackSettings(function, settings).measure == norm
    assert AttackSettings(function, settings, norm=norm.upper()).measure == norm
    other = "linf" if norm == "l2" else "l2"
    with pytest.raises(ValueError, match=f"to be '{norm}', as it says itself, but got '{other}'"):
        _ = AttackSettings(function, settings, norm=other).measure


def test_every_attack_of_the_package_says_its_norm() -> None:
    for name in attacks.__all__:
        if name.islower():
            assert AttackSettings(name).measure in ("l2", "linf")


@pytest.mark.parametrize("function", ["in_l2", "without_a_norm", "of_something_else"])
def test_a_function_that_does_not_say_its_norm_has_to_be_told(function: str) -> None:
    path = f"{__name__}.{function}"
    with pytest.raises(ValueError, match=rf"say what {path} keeps small.* Add `norm: l2` or `norm: linf`"):
        _ = AttackSettings(path).measure
    for given, norm in (
        ("l2", "l2"),
        ("LINF", "linf"),
        (2, "l2"),
        (np.inf, "linf"),
        ("2", "l2"),
        ("inf", "linf"),
    ):
        assert AttackSettings(path, norm=given).measure == norm
    # It is no setting of the attack, so adversarials that are there stay what they are.
    assert AttackSettings(path, norm="l2").describe() == AttackSettings(path).describe()


def by_default_linf(logits_fn: Any, images: Any, labels: Any, *, norm: str = "linf") -> Any: ...


def in_l2(logits_fn: Any, images: Any, labels: Any, *, eps: float) -> Any: ...


def without_a_norm(logits_fn: Any, images: Any, labels: Any) -> Any: ...


def of_something_else(logits_fn: Any, images: Any, labels: Any, *, norm: str = "batch") -> Any: ...


@pytest.mark.parametrize("norm", ["l1", "L1", 1, 1.0, "L0", "wasserstein", 3])
def test_other_norms_are_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match=f"the norm of {__name__}.in_l2 to be L2 or Linf, .* but got"):
        AttackSettings(f"{__name__}.in_l2", {"eps": 1.0}, norm=norm).check()


def test_other_norms_of_a_functions_own_are_refused() -> None:
    for settings in ({"norm": "L1"}, {"norm": 0}):
        with pytest.raises(ValueError, match=r"to be L2 or Linf, .* but got 'l[01]'. Take an attack in L2"):
            _ = AttackSettings(f"{__name__}.by_default_linf", settings).measure
