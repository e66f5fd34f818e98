"""Records of a leaderboard: what attacks do to every victim.

An *entry* is an attack on one target, such as ``bim, dknnb_cl``: all its runs, one for each combination of
what it varies. A victim is the backbone (``dnn``), the kNN on a layer (``knn/<layer>``) or ``dknn``. An
adversarial *fools* a victim that misclassifies it as stored. So a clean image that a victim misclassifies
fools it at distance 0. The column ``counted`` says which adversarial of each image a record counts:

- ``run``: the one of the run at this eps, success or not. The accuracy is the one under this attack. Of
  several runs at one eps, which vary something else, the nearest that fools counts, else the first run's. A
  minimum-norm attack has no eps. Clean images are an attack with eps 0.
- ``nearest``: the nearest in the record's norm that fools, of all the entry's runs and the clean image, if it
  is within eps. The accuracy is the share of images without one: what is left within a budget of eps. The
  entry ``worst case`` has such records of all entries together.
- ``bound``: none. The entry ``lower bound`` has, for a victim where it is known, a lower bound of the
  distance of every adversarial that can exist; 0 for an image that the victim misclassifies. Its accuracy at
  an eps of L2 is the share of images whose bound exceeds it: no attack leaves less. Its least true L2 are the
  bounds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_advknn.choices import Norm
from lightning_advknn.experiment.settings import ROUNDING
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, alarm_threshold, nearest
from lightning_advknn.reports.records.csv_files import Record
from lightning_advknn.reports.records.grouping import grouped

LEADERBOARD = (
    "attack",
    "victim",
    "norm",
    "eps",
    "accuracy",
    "l2_mean",
    "min_l2_mean",
    "min_l2_median",
    "credibility_success_mean",
    "n",
    "seconds_per_image",
    "seed",
    "method",
    "counted",
    "fooled",
    "linf",
    "credibility_mean",
    "detected",
    "queries",
)
"""Columns of ``leaderboard.csv``."""

_BUDGETS: dict[Norm, Sequence[float]] = {"linf": (), "l2": tuple(half / 2 for half in range(1, 11))}
"""Eps of an entry's records, beside those that attacks were run at."""

WORST_CASE, BOUND = "worst case", "lower bound"  # entries that are no attacks, beside `CLEAN`


def leaderboard_records(
    runs: Sequence[AttackRun], clean: AttackRun, seed: int, bounds: Mapping[str, Tensor] | None = None
) -> list[Record]:
    """All records: clean images first, then entries in order, the worst case, the lower bound.

    ``accuracy``, ``fooled`` and ``detected`` are in %. Over the images with an adversarial that counts:
    ``l2_mean`` is mean true L2, ``linf`` the largest change of a pixel, ``credibility_mean`` mean
    credibility. Over those of them that fool the victim: ``credibility_success_mean``, and ``detected``, the
    share with a credibility below `alarm_threshold`. Over the whole entry: ``fooled``, the share of images
    with an adversarial that fools at any distance; ``min_l2_mean`` and ``min_l2_median`` of the least true L2
    that fools (the mean only if all images are fooled, the median unless it is infinite).
    ``seconds_per_image`` and ``queries`` are sums over the runs that the record uses.

    Args:
        runs: Of all entries, on the same images.
        clean: The same images as they are.
        seed: Of training.
        bounds: By victim, as in `checks.run_checks`.
    """
    radii: dict[Norm, list[float]] = {}
    for norm, budgets in _BUDGETS.items():
        radii[norm] = sorted(
            {run.eps for run in runs if run.norm == norm and run.eps is not None} | set(budgets)
        )
    entries = grouped(runs, lambda run: run.entry)
    records: list[Record] = []
    for victim, judged in clean.victims.items():
        threshold = None if judged.credibility is None else alarm_threshold(judged.credibility)
        make = _Records(victim, clean, threshold, seed)
        records.append(make.of_clean())
        for own in entries.values():
            records += make.of_entry(own, radii)
        records += make.of_worst_case(runs, radii)
        if bounds and victim in bounds:
            records += make.of_bound(bounds[victim], radii["l2"])
    order = [clean.entry, *entries, WORST_CASE, BOUND]
    return sorted(records, key=lambda record: order.index(str(record["attack"])))


@dataclass(frozen=True)
class _Records:
    """Makes the records of one victim. A credibility below the threshold counts as detected."""

    victim: str
    clean: AttackRun
    threshold: float | None
    seed: int

    def of_clean(self) -> Record:
        """Images as they are."""
        return self._all_of([self.clean]) | {"attack": self.clean.entry, "eps": 0}

    def of_entry(self, runs: Sequence[AttackRun], radii: Mapping[Norm, Sequence[float]]) -> list[Record]:
        """One record at each eps that the attack was run at, and one at each other budget."""
        entry: Record = {"attack": runs[0].entry, "method": runs[0].method, **self._least(runs)}
        at_eps = grouped(runs, lambda run: (run.norm, run.eps))
        records = [
            entry | _cost(some) | self._all_of(some) | {"norm": norm, "eps": eps}
            for (norm, eps), some in at_eps.items()
        ]
        norms: list[Norm] = ["linf", "l2"] if ("linf", None) in at_eps else ["l2"]
        places = [(norm, eps) for norm in norms for eps in radii[norm] if (norm, eps) not in at_eps]
        return records + [entry | _cost(runs) | self._within(runs, *place) for place in places]

    def of_worst_case(self, runs: Sequence[AttackRun], radii: Mapping[Norm, Sequence[float]]) -> list[Record]:
        """What all entries together leave at each eps."""
        entry: Record = {"attack": WORST_CASE, **self._least(runs), **_cost(runs)}
        places = [(norm, eps) for norm in radii for eps in radii[norm]]
        return [entry | self._within(runs, *place) for place in places]

    def of_bound(self, bound: Tensor, radii: Sequence[float]) -> list[Record]:
        """What every possible attack leaves at least at each eps of L2."""
        entry: Record = {"attack": BOUND, "victim": self.victim, "norm": "l2", "counted": "bound"}
        entry |= {**_mean_and_median(bound), "n": len(bound), "seed": self.seed}
        return [entry | {"eps": eps, "accuracy": _share(bound > eps + ROUNDING)} for eps in radii]

    def _all_of(self, runs: Sequence[AttackRun]) -> Record:
        _, index = nearest(runs, self.victim, runs[0].norm)
        return self._numbers(runs, index, torch.ones_like(index, dtype=torch.bool)) | {"counted": "run"}

    def _within(self, runs: Sequence[AttackRun], norm: Norm, eps: float) -> Record:
        distance, index = nearest([self.clean, *runs], self.victim, norm)
        record = self._numbers([self.clean, *runs], index, distance <= eps + ROUNDING)
        return record | {"counted": "nearest", "norm": norm, "eps": eps}

    def _numbers(self, runs: Sequence[AttackRun], index: Tensor, counts: Tensor) -> Record:
        """Over the images that count, each with its adversarial of the run at its index."""

        def pick(columns: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(columns)).gather(0, index[None])[0]

        judged = [run.victims[self.victim] for run in runs]
        wrong = pick([one.wrong for one in judged]) & counts
        record: Record = {
            "victim": self.victim,
            "accuracy": _share(~wrong),
            "l2_mean": _mean(pick([run.l2 for run in runs])[counts]),
            "linf": _rounded(max(pick([run.linf for run in runs])[counts].tolist(), default=math.nan)),
            "n": len(index),
            "seed": self.seed,
        }
        if self.threshold is not None:
            credibility = pick([one.credibility for one in judged if one.credibility is not None])
            record["credibility_mean"] = _mean(credibility[counts])
            record["credibility_success_mean"] = _mean(credibility[wrong])
            record["detected"] = _share(credibility[wrong] < self.threshold)
        return record

    def _least(self, runs: Sequence[AttackRun]) -> Record:
        """Least true L2 that fools, over a whole entry."""
        distance, _ = nearest([self.clean, *runs], self.victim, "l2")
        return {"fooled": _share(distance.isfinite()), **_mean_and_median(distance)}


def _mean_and_median(distances: Tensor) -> Record:
    return {
        "min_l2_mean": _mean(distances),
        "min_l2_median": _rounded(statistics.median(distances.tolist())),
    }


def _cost(runs: Sequence[AttackRun]) -> Record:
    return {
        "seconds_per_image": round(sum(run.seconds for run in runs), 6),
        "queries": round(sum(run.queries for run in runs), 2),
    }


def _mean(values: Tensor) -> float | None:
    return _rounded(values.mean().item())


def _share(values: Tensor) -> float | None:
    """In %."""
    return _rounded(100 * values.double().mean().item())


def _rounded(value: float) -> float | None:
    """None for infinity, and for NaN, the mean of nothing."""
    return round(value, 4) if math.isfinite(value) else None
