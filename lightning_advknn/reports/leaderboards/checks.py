"""Checks of a leaderboard that no sound evaluation of robustness fails (arXiv 1902.06705, 1802.00420).

A failed check stops nothing: it says where to look.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.experiment.settings import ROUNDING
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, nearest

MARGIN = 0.5  # points of accuracy, or % of a distance, that may be chance


class Check(NamedTuple):
    """A sanity check."""

    check: str
    """What should hold."""
    holds: bool | None
    """None if there was nothing to check."""
    detail: str
    """What fails, or how much was checked."""


def failed(checks: Sequence[Check]) -> list[str]:
    """A line for each check that fails.

    >>> failed([Check("a", True, "3 attacks"), Check("b", False, "bim, origin"), Check("c", None, "-")])
    ['Check failed: b: bim, origin']
    """
    return [f"Check failed: {check.check}: {check.detail}" for check in checks if check.holds is False]


def counted(checks: Sequence[Check]) -> str:
    """How many checks hold.

    >>> counted([Check("a", True, "3 attacks"), Check("b", False, "bim, origin"), Check("c", None, "-")])
    'Checks: 1 hold, 1 do not, 1 had nothing to look at.'
    """
    hold = sum(check.holds is True for check in checks)
    empty = sum(check.holds is None for check in checks)
    return f"Checks: {hold} hold, {len(checks) - hold - empty} do not, {empty} had nothing to look at."


def run_checks(
    runs: Sequence[AttackRun], clean: AttackRun, bounds: Mapping[str, Tensor] | None = None
) -> list[Check]:
    """The checks that need runs alone.

    Args:
        runs: Of all entries.
        clean: The images as they are.
        bounds: By victim, a lower bound of the true L2 of each image's adversarials, ``(n,)``; 0 where the
            victim misclassifies the image itself.
    """
    return [
        _in_balls(runs),
        _falls_with_eps(runs),
        _unbounded_reach_zero(runs),
        _more_steps_never_hurt(runs),
        _never_below_bounds(runs, clean, bounds or {}),
    ]


def _in_balls(runs: Sequence[AttackRun]) -> Check:
    """Adversarials of an attack with an eps must be within it, in the norm that eps is taken for."""
    bounded = [(run, run.eps) for run in runs if run.eps is not None and run.norm]
    beyond = []
    for run, eps in bounded:
        farthest = float(run.distance(run.norm).max())
        if farthest > eps + ROUNDING:
            beyond.append(f"{run.name}: {run.norm} {farthest:.6f}")
        elif run.norm == "linf" and 0 < float(run.l2.max()) <= eps + ROUNDING:
            beyond.append(f"{run.name}: so is its L2; if eps is of L2, its `norm` has to say so")
    return check_of("adversarials stay within eps", len(bounded), "attacks with eps", beyond)


def _falls_with_eps(runs: Sequence[AttackRun]) -> Check:
    """Each victim's accuracy must fall as an attack's eps grows and nothing else changes."""
    pairs = _steps(runs, "eps")
    rising = []
    for small, large in pairs:
        for victim in small.victims:
            before, after = (_accuracy(run.victims[victim].wrong) for run in (small, large))
            if after > before + MARGIN:
                rising.append(
                    f"{large.entry} on {victim}: {before:.2f} % at {small.eps:g}, {after:.2f} % at"
                    f" {large.eps:g}"
                )
    name = f"accuracy falls monotonically with eps, to {MARGIN:g} points"
    return check_of(name, len(pairs), "steps from one eps to the next", rising)


def _unbounded_reach_zero(runs: Sequence[AttackRun]) -> Check:
    """Unbounded attacks must fool their target on every image attacked with its true label."""
    # All images in [0, 1] are within an Linf ball of 1.
    free = [run for run in runs if run.eps is None or (run.norm == "linf" and run.eps >= 1)]
    left = [(run, int(run.left.sum())) for run in free]
    some = [f"{run.name}: {count} of {int(run.meant.sum())} images left" for run, count in left if count]
    return check_of("unbounded attacks reach 0 % on what they attack", len(free), "such attacks", some)


def _more_steps_never_hurt(runs: Sequence[AttackRun]) -> Check:
    """More steps must not weaken an attack on its target: no higher accuracy, no larger median distance."""
    pairs = _steps(runs, "steps")
    worse = []
    for few, many in pairs:
        before, after = (_result(run) for run in (few, many))
        slack = MARGIN if few.eps is not None else before * MARGIN / 100
        if after > before + slack:
            steps = [run.attack["settings"]["steps"] for run in (few, many)]
            worse.append(f"{many.name}: {before:.4g} after {steps[0]} steps, {after:.4g} after {steps[1]}")
    name = f"more steps never hurt, to {MARGIN:g} points or %"
    return check_of(name, len(pairs), "steps from fewer to more", worse)


def _never_below_bounds(runs: Sequence[AttackRun], clean: AttackRun, bounds: Mapping[str, Tensor]) -> Check:
    """No adversarial may be nearer than the lower bound of its victim."""
    below = []
    for victim, bound in bounds.items():
        distance, index = nearest([clean, *runs], victim, "l2")
        under = distance < bound * (1 - ROUNDING) - ROUNDING
        if under.any():
            first = int(under.nonzero()[0])
            run = [clean, *runs][int(index[first])]
            below.append(
                f"{victim}: {int(under.sum())} images, the first of {run.name} at {distance[first]:.6f},"
                f" bound {bound[first]:.6f}"
            )
    return check_of("no distance is below its lower bound", len(bounds), "victims with bounds", below)


def check_of(name: str, n: int, what: str, against: Sequence[str]) -> Check:
    """A check on n things, such as attacks. It holds if nothing speaks against it."""
    if not n:
        return Check(name, None, f"no {what}")
    return Check(name, not against, "; ".join(against) or f"{n} {what}")


def series_of(runs: Sequence[AttackRun], setting: str) -> list[list[AttackRun]]:
    """Runs of one attack on one target that differ in one setting alone, by growing values of it."""
    found: dict[str, dict[float, AttackRun]] = {}
    for run in runs:
        settings = dict(run.attack["settings"])
        value = settings.pop(setting, None)
        if value is not None:
            rest = {**run.attack, "settings": sorted(settings.items()), "on": run.method}
            found.setdefault(repr(sorted(rest.items())), {})[float(value)] = run
    return [[series[value] for value in sorted(series)] for series in found.values()]


def _steps(runs: Sequence[AttackRun], setting: str) -> list[tuple[AttackRun, AttackRun]]:
    """Neighbours in each series."""
    return [pair for series in series_of(runs, setting) for pair in pairwise(series)]


def _result(run: AttackRun) -> float:
    """What an attack minimizes: accuracy in % within a ball, else its median distance."""
    if run.eps is not None:
        return _accuracy(run.own)
    median: float = statistics.median(run.distance(run.norm).where(run.own, torch.inf).tolist())
    return median


def _accuracy(wrong: Tensor) -> float:
    return 100 * float((~wrong).double().mean())
