"""Records and checks of a leaderboard, by hand and by loops over images."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_advknn import attacks
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.choices import Norm
from lightning_advknn.evaluation import Judged, judge_rows
from lightning_advknn.reports.leaderboards import checks
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, alarm_threshold
from lightning_advknn.reports.leaderboards.records import LEADERBOARD, leaderboard_records
from lightning_advknn.reports.records.csv_files import Record


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run_of(
    entry: str,
    eps: float | None,
    l2: Sequence[float],
    linf: Sequence[float],
    wrong: str,
    credibility: Sequence[float],
    norm: Norm | None = "linf",
    **more: Any,
) -> AttackRun:
    """A run that DkNN and the backbone judge alike; in `wrong`, an x is an image that they get wrong."""
    x = torch.tensor([letter == "x" for letter in wrong])
    judged = {"dnn": Judged(x, None), "dknn": Judged(x, doubles(*credibility))}
    settings = {} if eps is None else {"eps": eps}
    attack = {"function": entry.partition(",")[0], "settings": settings}
    method = entry.partition(", ")[2]
    columns = (doubles(*l2), doubles(*linf), judged, x, torch.ones_like(x))
    return replace(AttackRun(entry, method, attack, norm, eps, *columns), **more)


# Six images, of which DkNN gets the last wrong as it is.
CLEAN = run_of("clean", 0.0, [0] * 6, [0] * 6, ".....x", [0.9, 0.8, 0.7, 0.6, 0.5, 0.2], None)
SMALL = run_of(
    "bim, s",
    0.1,
    [1.0, 1.2, 0.8, 1.0, 1.4, 0.6],
    [torch.tensor(0.1).item()] * 6,  # a float32, which is a little more
    "x....x",
    [0.1, 0.9, 0.8, 0.7, 0.6, 0.3],
    seconds=0.5,
)
LARGE = run_of(
    "bim, s",
    0.2,
    [2.0, 2.2, 1.8, 1.6, 2.6, 1.2],
    [0.2] * 6,
    "xx.x..",
    [0.4, 0.15, 0.8, 0.05, 0.6, 0.9],
    seconds=0.25,
)
LEAST = run_of(
    "least, dknn",
    None,
    [0.5, 0.5, 3.0, 0.9, 4.4, 0.0],
    [0.3, 0.3, 0.3, 0.3, 0.15, 0.0],
    "xxxxxx",
    [0.3, 0.1, 0.05, 0.25, 0.15, 0.2],
    "l2",
    seconds=2.0,
    queries=7.0,
)


def by_place(records: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    """Records by what names them, which is to be unique."""
    found = {(r["attack"], r["victim"], r.get("norm"), r.get("eps")): r for r in records}
    assert len(found) == len(records)
    return found


def test_records_by_hand() -> None:
    records = leaderboard_records([SMALL, LARGE, LEAST], CLEAN, seed=3)
    assert all(set(record) <= set(LEADERBOARD) for record in records)
    assert {record["seed"] for record in records} == {3}
    assert list(dict.fromkeys(r["attack"] for r in records)) == [
        "clean",
        "bim, s",
        "least, dknn",
        "worst case",
    ]
    found = by_place(records)
    clean = found["clean", "dknn", None, 0]
    assert (clean["accuracy"], clean["l2_mean"], clean["n"]) == (83.3333, 0.0, 6)
    assert (clean["credibility_mean"], clean["credibility_success_mean"]) == (0.6167, 0.2)
    assert clean.get("min_l2_median") is None

    # The threshold is the lowest clean credibility, .2, as 5 % of six images are none.
    # Least L2 that fools: 1 (small eps), 2.2 (large), none, 1.6 (large), none, 0 (clean image).
    entry = {"method": "s", "n": 6, "fooled": 66.6667, "min_l2_mean": None, "min_l2_median": 1.9, "seed": 3}
    assert found["bim, s", "dknn", "linf", 0.1] == entry | {
        "attack": "bim, s",
        "victim": "dknn",
        "norm": "linf",
        "eps": 0.1,
        "accuracy": 66.6667,
        "l2_mean": 1.0,
        "linf": 0.1,
        "credibility_mean": 0.5667,
        "credibility_success_mean": 0.2,  # of .1 and .3
        "detected": 50.0,
        "seconds_per_image": 0.5,
        "queries": 0.0,
        "counted": "run",
    }
    large = found["bim, s", "dknn", "linf", 0.2]
    # The last image is right again: at a fixed eps this counts for the victim.
    assert (large["accuracy"], large["l2_mean"], large["seconds_per_image"]) == (50.0, 1.9, 0.25)
    assert (large["credibility_mean"], large["credibility_success_mean"]) == (0.4833, 0.2)
    assert large["detected"] == 66.6667  # .15 and .05 of three
    budgets = {eps: found["bim, s", "dknn", "l2", eps / 10] for eps in range(5, 55, 5)}
    assert [budgets[eps]["accuracy"] for eps in budgets] == [83.3333, 66.6667, 66.6667, 50.0] + [33.3333] * 6
    # Within 1: the first image at 1 with credibility .1, the last as it is with .2.
    assert budgets[10] == entry | {
        "attack": "bim, s",
        "victim": "dknn",
        "norm": "l2",
        "eps": 1.0,
        "accuracy": 66.6667,
        "l2_mean": 0.5,
        "linf": 0.1,
        "credibility_mean": 0.15,
        "credibility_success_mean": 0.15,
        "detected": 50.0,
        "seconds_per_image": 0.75,
        "queries": 0.0,
        "counted": "nearest",
    }

    least = found["least, dknn", "dknn", "l2", None]
    assert (least["accuracy"], least["fooled"], least["counted"]) == (0.0, 100.0, "run")
    assert (least["l2_mean"], least["min_l2_mean"], least["min_l2_median"]) == (1.55, 1.55, 0.7)
    assert (least["queries"], least["seconds_per_image"]) == (7.0, 2.0)
    assert ("least, dknn", "dknn", "linf", 0.1) not in found  # it makes L2 small

    def worst(norm: str, eps: float) -> Any:
        return found["worst case", "dknn", norm, eps]["accuracy"]

    assert [worst("linf", eps) for eps in (0.1, 0.2)] == [
        66.6667,
        16.6667,
    ]  # at .2 the fifth by `least`, .15 away
    accuracies = [50.0, 33.3333, 33.3333, 33.3333, 33.3333, 16.6667, 16.6667, 16.6667, 0.0, 0.0]
    assert [worst("l2", eps / 10) for eps in range(5, 55, 5)] == accuracies
    robust = found["worst case", "dknn", "linf", 0.2]
    assert (robust["min_l2_mean"], robust["seconds_per_image"], robust["queries"]) == (1.55, 2.75, 7.0)

    dnn = found["bim, s", "dnn", "linf", 0.1]
    assert (dnn["accuracy"], dnn.get("credibility_mean"), dnn.get("detected")) == (66.6667, None, None)


def test_lower_bounds_by_hand() -> None:
    bounds = {"dknn": doubles(0.5, 0.4, 2.6, 0.9, math.inf, 0.0)}
    records = leaderboard_records([SMALL, LEAST], CLEAN, 3, bounds)
    without = leaderboard_records([SMALL, LEAST], CLEAN, 3)
    assert [record for record in records if record["attack"] != "lower bound"] == without
    found = [record for record in records if record["attack"] == "lower bound"]
    # A bound of .5 does not keep an attack within .5 from fooling.
    accuracies = [50.0, 33.3333, 33.3333, 33.3333, 33.3333] + [16.6667] * 5
    assert [record["accuracy"] for record in found] == accuracies
    assert [record["eps"] for record in found] == [half / 2 for half in range(1, 11)]
    # Without a mean, as no perturbation changes the fifth; the median is of .5 and .9.
    same = {"victim": "dknn", "norm": "l2", "n": 6, "counted": "bound", "seed": 3}
    same |= {"min_l2_mean": None, "min_l2_median": 0.7}
    assert all(same.items() <= record.items() for record in found)
    assert not any("credibility" in name or name == "detected" for record in found for name in record)


def test_what_an_attack_was_run_at_has_one_record() -> None:
    linf = replace(LEAST, entry="near, dknn", norm="linf")
    ball = replace(SMALL, entry="ball, dknn", norm="l2", eps=2.0)
    odd = replace(LARGE, entry="ball, dknn", norm="l2", eps=2.7)
    found = by_place(leaderboard_records([SMALL, linf, ball, odd], CLEAN, seed=0))
    # What makes Linf small is measured at each eps of Linf that there is, by its own Linf.
    near = found["near, dknn", "dknn", "linf", 0.1]
    assert (near["accuracy"], near["counted"]) == (83.3333, "nearest")
    # Its run at 2 stands at this budget; at 2.5 the nearest, which is the same; everyone is measured at 2.7.
    assert [found["ball, dknn", "dknn", "l2", eps]["counted"] for eps in (2.0, 2.5, 2.7)] == [
        "run",
        "nearest",
        "run",
    ]
    assert found["bim, s", "dknn", "l2", 2.7]["accuracy"] == 66.6667


def test_runs_at_one_eps_count_as_one() -> None:
    again = replace(LARGE, eps=0.1, linf=SMALL.linf, seconds=1.0)
    found = by_place(leaderboard_records([SMALL, again], CLEAN, seed=0))
    both = found["bim, s", "dknn", "linf", 0.1]
    # Wrong in either: the first (in both, at equal Linf: the first run's), second, fourth, last; else the first run's.
    assert (both["accuracy"], both["seconds_per_image"]) == (33.3333, 1.5)
    assert both["l2_mean"] == round((1.0 + 2.2 + 0.8 + 1.6 + 1.4 + 0.6) / 6, 4)
    assert both["credibility_success_mean"] == round((0.1 + 0.15 + 0.05 + 0.3) / 4, 4)


def test_records_are_what_loops_over_images_count() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(entry: str, norm: Norm | None, eps: float | None) -> AttackRun:
        n = 41
        l2, linf, credibility = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(3))
        wrong = "".join("x" if value < 0.4 else "." for value in torch.rand(n, generator=generator).tolist())
        far = 0.0 if entry == "clean" else 6.0
        linf = linf if eps is None else linf * eps
        return run_of(entry, eps, (l2 * far).tolist(), linf.tolist(), wrong, credibility.tolist(), norm)

    clean = some("clean", None, 0.0)
    runs = [some(entry, "linf", eps) for entry in ("bim, a", "bim, b") for eps in (0.1, 0.2, 0.3)]
    runs += [some("least, dknn", "l2", None)]
    confident = sorted(clean.victims["dknn"].credibility.tolist())
    threshold = confident[2]  # 5 % of 41 are two
    for record in leaderboard_records(runs, clean, seed=0):
        own = [run for run in runs if record["attack"] in (run.entry, "worst case")]
        if record["victim"] != "dknn" or not own:
            continue
        chosen, fooled, least = [], [], []
        for image in range(41):
            candidates = []
            for run in [clean, *own]:
                judged = run.victims["dknn"]
                distance = float((run.linf if record["norm"] == "linf" else run.l2)[image])
                credibility = float(judged.credibility[image])
                is_wrong = bool(judged.wrong[image])
                candidates.append((distance, float(run.l2[image]), credibility, is_wrong, run))
            least.append(min((l2 for _, l2, _, wrong, _ in candidates if wrong), default=math.inf))
            if record["counted"] == "run":
                (one,) = (c for c in candidates if (c[4].eps, c[4].norm) == (record["eps"], record["norm"]))
                chosen.append(one)
                fooled.append(one[3])
            else:
                near = [c for c in candidates if c[3] and c[0] <= record["eps"]]
                chosen += [min(near, key=lambda c: c[0])] if near else []
                fooled.append(bool(near))
        successes = [c[2] for c in chosen if c[3]]
        expected = {
            "accuracy": 100 * fooled.count(False) / 41,
            "l2_mean": statistics.fmean(c[1] for c in chosen),
            "credibility_mean": statistics.fmean(c[2] for c in chosen),
            "credibility_success_mean": statistics.fmean(successes),
            "detected": 100 * sum(value < threshold for value in successes) / len(successes),
            "fooled": 100 * sum(map(math.isfinite, least)) / 41,
            "min_l2_median": statistics.median(least),
        }
        assert {name: record[name] for name in expected} == pytest.approx(
            {name: value if math.isfinite(value) else None for name, value in expected.items()}, abs=1e-4
        )


def test_votes_judge_every_layer_by_hand() -> None:
    rows = {
        "label": torch.tensor([0, 0, 1]),
        "dnn_after": torch.tensor([0, 1, 1]),
        # Layers a and b of k = 4: both right; a wrong and the sum wrong; a ties (class 0 wins), the sum right.
        "votes_after": torch.tensor([[[4, 0], [3, 1]], [[0, 4], [3, 1]], [[2, 2], [0, 4]]]),
    }
    calibration = torch.tensor([[4, 4], [3, 4], [2, 1], [0, 3]])  # sums 8, 7, 3, 3
    judged = judge_rows(rows, ("a", "b"), calibration, "strict")
    assert list(judged) == ["dnn", "knn/a", "knn/b", "dknn"]
    wrong = {victim: one.wrong.tolist() for victim, one in judged.items()}
    assert wrong == {
        "dnn": [False, True, False],
        "knn/a": [False, True, True],
        "knn/b": [False, False, False],
        "dknn": [False, True, False],
    }
    assert judged["dnn"].credibility is None
    # Shares of calibration images with fewer votes than the winner: a 4, 4, 2; b 3, 3, 4; both 7, 5, 6.
    for victim, shares in {
        "knn/a": [0.75, 0.75, 0.25],
        "knn/b": [0.25, 0.25, 0.5],
        "dknn": [0.5] * 3,
    }.items():
        assert judged[victim].credibility.tolist() == shares


@pytest.mark.parametrize("n", [1, 19, 20, 39, 41, 60, 547, 9250])
def test_the_threshold_is_the_largest_with_few_false_alarms(n: int) -> None:
    credibility = torch.randint(0, 30, (n,), generator=torch.Generator().manual_seed(n)).double() / 30
    threshold = alarm_threshold(credibility)
    assert (credibility < threshold).sum() <= n / 20
    above = credibility[credibility > threshold]
    assert not len(above) or (credibility < above.min()).sum() > n / 20


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
            lambda: checks.in_balls([replace(LARGE, linf=doubles(0.1, 0.2, 0.200002, 0, 0, 0))]),
            "bim, s at 0.2: linf 0.200002",
        ),
        (lambda: checks.in_balls([replace(SMALL, norm="l2", eps=1.2)]), "bim, s at 1.2: l2 1.400000"),
        (lambda: checks.in_balls([replace(SMALL, eps=1.5)]), "bim, s at 1.5: so is its L2"),
        (
            lambda: checks.falls_with_eps([wrongly(LARGE, ".....x"), SMALL]),
            "bim, s on dknn: 66.67 % at 0.1, 83.33 % at 0.2",
        ),
        (
            lambda: checks.unbounded_reach_zero([SMALL, wrongly(LEAST, "xxx.xx")]),
            "least, dknn: 1 of 6 images left",
        ),
        (
            lambda: checks.unbounded_reach_zero([replace(SMALL, eps=1.0)]),
            "bim, s at 1: 4 of 6 images left",
        ),
        (
            lambda: checks.more_steps_never_hurt([stepped(SMALL, 10), stepped(wrongly(SMALL, ".....x"), 20)]),
            "bim, s at 0.1: 66.67 after 10 steps, 83.33 after 20",
        ),
        (
            # The median of .5, .5, 3, .9, 4.4, 0 is .7; without the first image it is 1.95.
            lambda: checks.more_steps_never_hurt([stepped(LEAST, 10), stepped(wrongly(LEAST, ".xxxxx"), 20)]),
            "least, dknn: 0.7 after 10 steps, 1.95 after 20",
        ),
        (
            lambda: checks.never_below_bounds(
                [SMALL, LEAST], CLEAN, {"dknn": doubles(0.5, 0.6, 3.0, 1.0, 4.0, 0)}
            ),
            "dknn: 2 images, the first of least, dknn at 0.500000, bound 0.600000",
        ),
        (
            lambda: checks.never_below_bounds([SMALL], CLEAN, {"dknn": doubles(0, 0, 0, 0, 0, 0.1)}),
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
    assert checks.unbounded_reach_zero(
        [replace(wrongly(LEAST, "xxx.xx"), meant=torch.tensor([True, True, True, False, True, True]))]
    ).holds
    # Other settings, another target or another function: no comparison.
    other = [rename(wrongly(LARGE, "......"), "bim, t"), SMALL]
    assert checks.falls_with_eps(other).holds is None
    function = replace(wrongly(LARGE, "......"), attack={"function": "fgsm", "settings": {"eps": 0.2}})
    assert checks.falls_with_eps([SMALL, function]).holds is None
    # One image of 300 is within half a point, two are not.
    n = 300
    larger = run_of("bim, s", 0.2, [2] * n, [0.2] * n, "." * n, [0] * n)
    for images, holds in ((1, True), (2, False)):
        wrong = "x" * images + "." * (n - images)
        smaller = run_of("bim, s", 0.1, [1] * n, [0.1] * n, wrong, [0] * n)
        assert checks.falls_with_eps([smaller, larger]).holds is holds


def test_the_worst_case_is_no_better_than_any_entry() -> None:
    found = by_place(leaderboard_records([SMALL, LARGE, LEAST], CLEAN, seed=0))
    for (attack, victim, norm, eps), record in found.items():
        if attack != "clean" and eps is not None:
            assert found["worst case", victim, norm, eps]["accuracy"] <= record["accuracy"]
    for low, high in itertools.pairwise(range(5, 55, 5)):
        worst = [found["worst case", "dknn", "l2", eps / 10]["accuracy"] for eps in (low, high)]
        assert worst[0] >= worst[1]
