"""Records of a leaderboard, by hand and by loops over images."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_advknn.choices import Norm
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun
from lightning_advknn.reports.leaderboards.records import LEADERBOARD, leaderboard_records
from lightning_advknn.reports.records.csv_files import Record
from tests.reports.leaderboards.runs import CLEAN, LARGE, LEAST, SMALL, doubles, run_of


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


def test_the_worst_case_is_no_better_than_any_entry() -> None:
    found = by_place(leaderboard_records([SMALL, LARGE, LEAST], CLEAN, seed=0))
    for (attack, victim, norm, eps), record in found.items():
        if attack != "clean" and eps is not None:
            assert found["worst case", victim, norm, eps]["accuracy"] <= record["accuracy"]
    for low, high in itertools.pairwise(range(5, 55, 5)):
        worst = [found["worst case", "dknn", "l2", eps / 10]["accuracy"] for eps in (low, high)]
        assert worst[0] >= worst[1]
