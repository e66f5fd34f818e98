"""Checks that need runs alone, on runs made by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_advknn.evaluation import Judged
from lightning_advknn.reports.leaderboards import checks
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun
from tests.reports.leaderboards.runs import CLEAN, LARGE, LEAST, SMALL, doubles, run_of


def stepped(run: AttackRun, steps: int, **more: Any) -> AttackRun:
    """The same attack with so many steps."""
    settings = {**run.attack["settings"], "steps": steps}
    return replace(run, attack={**run.attack, "settings": settings}, **more)


def wrongly(run: AttackRun, wrong: str) -> AttackRun:
    """The same attack with other outcomes."""
    x = torch.tensor([letter == "x" for letter in wrong])
    judged = {name: Judged(x, one.credibility) for name, one in run.victims.items()}
    return replace(run, victims=judged, own=x)


def test_checks_hold() -> None:
    runs = [SMALL, LARGE, LEAST, stepped(SMALL, 10), stepped(wrongly(SMALL, "xx...x"), 20)]
    bounds = {"dknn": doubles(0.5, 0.4, 1.0, 0.9, 4.0, 0.0)}
    found = checks.run_checks(runs, CLEAN, bounds)
    assert [check.holds for check in found] == [True] * 5
    assert [check.detail for check in found] == [
        "4 attacks with eps",
        "1 steps from one eps to the next",
        "1 such attacks",
        "1 steps from fewer to more",
        "1 victims with bounds",
    ]
    assert [check.holds for check in checks.run_checks([], CLEAN)] == [None] * 5


def rename(run: AttackRun, entry: str) -> AttackRun:
    return replace(run, entry=entry, method=entry.partition(", ")[2])


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (
            lambda: checks._in_balls([replace(LARGE, linf=doubles(0.1, 0.2, 0.200002, 0, 0, 0))]),
            "bim, s at 0.2: linf 0.200002",
        ),
        (lambda: checks._in_balls([replace(SMALL, norm="l2", eps=1.2)]), "bim, s at 1.2: l2 1.400000"),
        (lambda: checks._in_balls([replace(SMALL, eps=1.5)]), "bim, s at 1.5: so is its L2"),
        (
            lambda: checks._falls_with_eps([wrongly(LARGE, ".....x"), SMALL]),
            "bim, s on dknn: 66.67 % at 0.1, 83.33 % at 0.2",
        ),
        (
            lambda: checks._unbounded_reach_zero([SMALL, wrongly(LEAST, "xxx.xx")]),
            "least, dknn: 1 of 6 images left",
        ),
        (
            lambda: checks._unbounded_reach_zero([replace(SMALL, eps=1.0)]),
            "bim, s at 1: 4 of 6 images left",
        ),
        (
            lambda: checks._more_steps_never_hurt(
                [stepped(SMALL, 10), stepped(wrongly(SMALL, ".....x"), 20)]
            ),
            "bim, s at 0.1: 66.67 after 10 steps, 83.33 after 20",
        ),
        (
            # The median of .5, .5, 3, .9, 4.4, 0 is .7; without the first image it is 1.95.
            lambda: checks._more_steps_never_hurt(
                [stepped(LEAST, 10), stepped(wrongly(LEAST, ".xxxxx"), 20)]
            ),
            "least, dknn: 0.7 after 10 steps, 1.95 after 20",
        ),
        (
            lambda: checks._never_below_bounds(
                [SMALL, LEAST], CLEAN, {"dknn": doubles(0.5, 0.6, 3.0, 1.0, 4.0, 0)}
            ),
            "dknn: 2 images, the first of least, dknn at 0.500000, bound 0.600000",
        ),
        (
            lambda: checks._never_below_bounds([SMALL], CLEAN, {"dknn": doubles(0, 0, 0, 0, 0, 0.1)}),
            "dknn: 1 images, the first of clean at 0 at 0.000000, bound 0.100000",
        ),
    ],
)
def test_checks_find_what_is_wrong(make: Callable[[], checks.Check], detail: str) -> None:
    check = make()
    assert check.holds is False
    assert detail in check.detail


def test_checks_do_not_mistake_what_is_right() -> None:
    # The attack was to leave a wrong label: it may end at the true one.
    assert checks._unbounded_reach_zero(
        [replace(wrongly(LEAST, "xxx.xx"), meant=torch.tensor([True, True, True, False, True, True]))]
    ).holds
    # Other settings, another target or another function: no comparison.
    other = [rename(wrongly(LARGE, "......"), "bim, t"), SMALL]
    assert checks._falls_with_eps(other).holds is None
    function = replace(wrongly(LARGE, "......"), attack={"function": "fgsm", "settings": {"eps": 0.2}})
    assert checks._falls_with_eps([SMALL, function]).holds is None
    # One image of 300 is within half a point, two are not.
    n = 300
    larger = run_of("bim, s", 0.2, [2] * n, [0.2] * n, "." * n, [0] * n)
    for images, holds in ((1, True), (2, False)):
        wrong = "x" * images + "." * (n - images)
        smaller = run_of("bim, s", 0.1, [1] * n, [0.1] * n, wrong, [0] * n)
        assert checks._falls_with_eps([smaller, larger]).holds is holds
