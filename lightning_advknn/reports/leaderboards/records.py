"""What attacks do to every victim, as records of a leaderboard.

Terms. An attack on something is an *entry*, such as ``bim, dknnb_cl``: all its runs, one for each combination of what it
varies. A victim is the backbone (``dnn``), the kNN on a layer (``knn/<layer>``) or ``dknn``. An adversarial *fools* a victim
that gets it wrong, as stored; so a clean image fools a victim that gets it wrong as it is, at no distance. Which of
an image's adversarials a record is about, its column ``counted`` says:

- ``run``: that of the run at this eps, be it a success or not, so the accuracy is the one under this attack. (Of several runs at
  one eps, which vary something else, an image counts the nearest that fools, else the first.) A minimum-norm attack
  has no eps. Clean images are an attack with eps 0.
- ``nearest``: the nearest in the record's norm that fools, of all the entry's runs and the clean image, if it is within eps. The accuracy
  is the share of images without one: what is left within a budget of eps. Of these the entry ``worst case`` has
  those of all entries together.
- ``bound``: none. The entry ``lower bound`` says of a victim, where it is known, how far from each image all that fools it is at
  least, be it by an attack that no one has thought of; 0 of an image that the victim gets wrong. Its accuracy at an
  eps of L2 is the share of images whose bound exceeds it: no attack leaves less. Its least true L2 are the bounds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_advknn.choices import Norm
from lightning_advknn.experiment.iterates import ROUNDING
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun, alarm_threshold, nearest
from lightning_advknn.reports.records.csv_files import Record

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
BUDGETS: dict[Norm, Sequence[float]] = {"linf": (), "l2": tuple(half / 2 for half in range(1, 11))}
"""Eps that entries have records at, beside those that attacks were run at."""

WORST_CASE, BOUND = "worst case", "lower bound"  # entries that are no attacks, beside `CLEAN`


def leaderboard_records(
    runs: Sequence[AttackRun], clean: AttackRun, seed: int, bounds: Mapping[str, Tensor] | None = None
) -> list[Record]:
    """All records, of columns `LEADERBOARD`: clean images first, then entries as they come, the worst case, the lower bound.

    ``accuracy``, ``fooled`` and ``detected`` are in %. Over the images that have an adversarial which counts (see above):
    ``l2_mean`` is mean true L2, ``linf`` the largest change of a pixel, ``credibility_mean`` mean credibility; over those of
    them that fool the victim: ``credibility_success_mean``, and ``detected``, the share whose credibility is below
    `alarm_threshold`. Of the entry as a whole, whatever the record: ``fooled``, the share of images of which the clean
    image or an adversarial at any distance fools the victim; ``min_l2_mean`` and ``min_l2_median`` of the least true L2 at
    which one does (the mean only if all are fooled, the median unless it is infinite). ``seconds_per_image`` and
    ``queries`` add up the runs that the record draws on.

    Args:
        runs: Of all entries, on the same images.
        clean: The same images as they are.
        seed: Of training.
        bounds: By victim, as in `checks.check_runs`.
    """
    radii: dict[Norm, list[float]] = {}
    for norm, budgets in BUDGETS.items():
        radii[norm] = sorted(
            {run.eps for run in runs if run.norm == norm and run.eps is not None} | set(budgets)
        )
    entries: dict[str, list[AttackRun]] = {}
    for run in runs:
        entries.setdefault(run.entry, []).append(run)
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
    """Makes the records of one victim; a credibility below the threshold is detected."""

    victim: str
    clean: AttackRun
    threshold: float | None
    seed: int

    def of_clean(self) -> Record:
        """Images as they are."""
        return self._all_of([self.clean]) | {"attack": self.clean.entry, "eps": 0}

    def of_entry(self, runs: Sequence[AttackRun], radii: Mapping[Norm, Sequence[float]]) -> list[Record]:
        """One record at each eps that an attack was run at, and one at each budget that it was not."""
        entry: Record = {"attack": runs[0].entry, "method": runs[0].method, **self._least(runs)}
        at_eps: dict[tuple[Norm | None, float | None], list[AttackRun]] = {}
        for run in runs:
            at_eps.setdefault((run.norm, run.eps), []).append(run)
        records = [
            entry | _cost(some) | self._all_of(some) | {"norm": norm, "eps": eps}
            for (norm, eps), some in at_eps.items()
        ]
        norms: list[Norm] = ["linf", "l2"] if ("linf", None) in at_eps else ["l2"]
        places = [(norm, eps) for norm in norms for eps in radii[norm] if (norm, eps) not in at_eps]
        return records + [entry | _cost(runs) | self._within(runs, *place) for place in places]

    def of_worst_case(self, runs: Sequence[AttackRun], radii: Mapping[Norm, Sequence[float]]) -> list[Record]:
        """What all entries together leave at each eps that there is."""
        entry: Record = {"attack": WORST_CASE, **self._least(runs), **_cost(runs)}
        places = [(norm, eps) for norm in radii for eps in radii[norm]]
        return [entry | self._within(runs, *place) for place in places]

    def of_bound(self, bound: Tensor, radii: Sequence[float]) -> list[Record]:
        """What all attacks that there can be leave at least at each eps of L2."""
        entry: Record = {"attack": BOUND, "victim": self.victim, "norm": "l2", "counted": "bound"}
        entry |= {**_spread(bound), "n": len(bound), "seed": self.seed}
        return [entry | {"eps": eps, "accuracy": _share(bound > eps + ROUNDING)} for eps in radii]

    def _all_of(self, runs: Sequence[AttackRun]) -> Record:
        _, index = nearest(runs, self.victim, runs[0].norm)
        return self._numbers(runs, index, torch.ones_like(index, dtype=torch.bool)) | {"counted": "run"}

    def _within(self, runs: Sequence[AttackRun], norm: Norm, eps: float) -> Record:
        distance, index = nearest([self.clean, *runs], self.victim, norm)
        record = self._numbers([self.clean, *runs], index, distance <= eps + ROUNDING)
        return record | {"counted": "nearest", "norm": norm, "eps": eps}

    def _numbers(self, runs: Sequence[AttackRun], index: Tensor, counts: Tensor) -> Record:
        """Over the images that count, each by its adversarial of the run with this index."""

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
        """Least true L2 that fools, of a whole entry."""
        distance, _ = nearest([self.clean, *runs], self.victim, "l2")
        return {"fooled": _share(distance.isfinite()), **_spread(distance)}


def _spread(distances: Tensor) -> Record:
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
