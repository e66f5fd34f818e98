"""Distributions of DkNN's credibility (Figure 5)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.over_seeds import Method, Results
from lightning_advknn.reports.render.blocks import Lines, Table

_THRESHOLDS = tuple(tenth / 10 for tenth in range(1, 10))


@dataclass(frozen=True)
class Distribution:
    """Credibility of some images, all seeds together.

    Args:
        label: Which images.
        l2: Their attack's mean true L2 of all images; 0 for clean images.
        counts: Number of images by credibility.
        successes: Whether only images that DkNN misclassifies count.
    """

    label: str
    l2: float
    counts: dict[float, int]
    successes: bool = False

    @property
    def n(self) -> int:
        """Number of images."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean credibility."""
        return sum(value * count for value, count in self.counts.items()) / self.n

    def below(self, threshold: float) -> float:
        """Share in % with a credibility below a threshold, which the threshold filters."""
        return 100 * sum(count for value, count in self.counts.items() if value < threshold) / self.n


def attacked_method(results: Results) -> Method | None:
    """Figure 5's surrogate: with consistency learning, on the kNN's layer; None without one."""
    for method in results.methods.values():
        if method.kind == "dknnb_cl" and method.layer == results.victim["layer"]:
            return method
    return None


def distributions(results: Results) -> list[Distribution]:
    """Distributions of clean images, then of adversarials at growing distortion: all, and successes."""
    method = attacked_method(results)
    if method is None:
        return []
    clean = _counts(results, "origin/clean", "all")
    found = [Distribution("clean", 0.0, clean)] if clean else []
    measured = [each for each in results.measurements() if each.method == method and each.victim == "dknn"]
    for each in sorted(measured, key=lambda each: each.l2.mean):
        for which in ("all", "success"):
            counts = _counts(results, f"{method.name}/{each.attack}", which)
            if each.function != "clean" and counts:
                label = f"{each.function.upper()}, eps {each.eps:g}"
                found.append(Distribution(label, each.l2.mean, counts, which == "success"))
    return found


def filter_table(results: Results, found: Sequence[Distribution]) -> Table:
    """Share of images that each threshold filters; the paper's numbers below."""
    ours: list[list[Lines]] = [
        [
            (each.label + (", successes" if each.successes else ""),),
            (f"{each.l2:.2f}",),
            (str(each.n),),
            (f"{each.mean:.3f}",),
            *((f"{each.below(threshold):.2f}",) for threshold in _THRESHOLDS),
        ]
        for each in found
    ]
    return Table(
        f"{results.title}: share of images in % whose credibility is below a threshold, convention"
        f" `{results.victim['convention']}`, seeds together. Successes are the images that DkNN gets wrong;"
        " L2 is that of all images of the attack.",
        ["images", "mean true L2", "n", "mean credibility", *(f"{threshold:g}" for threshold in _THRESHOLDS)],
        [*ours, *(_published() if results.dataset == "MNIST" else [])],
        sources=[results.name],
    )


def filter_sentence(results: Results, found: Sequence[Distribution]) -> str:
    """Our numbers for the threshold .5 beside the paper's; "" where it has none."""
    attacked = [each for each in found if each.l2 > 0 and not each.successes]
    if results.dataset != "MNIST" or not attacked or found[0].l2 > 0:
        return ""
    share, l2 = published.FILTERED
    true = published.true_l2(l2)
    nearest = min(attacked, key=lambda each: abs(each.l2 - true))
    return (
        f"A threshold of .5 filters {nearest.below(0.5):.2f} % of adversarials at a mean true L2 of"
        f" {nearest.l2:.2f} and {found[0].below(0.5):.2f} % of clean images (convention"
        f" `{results.victim['convention']}`). The paper: {share} % at {l2:g}, which is a true L2 of"
        f" {true:.2f} if its code's unit is meant, and {published.FILTERED_CLEAN} % of clean images; it does"
        " not say which convention, nor whether all adversarials or successes alone."
    )


def _published() -> list[list[Lines]]:
    """The paper's shares and mean credibilities."""
    (share, l2), (mean, far), (theirs, their_l2) = (
        published.FILTERED,
        published.CREDIBILITY,
        published.SITAWARIN_WAGNER_CREDIBILITY,
    )
    rows: list[list[Lines]] = []
    for images, distortion, credibility, at_half in (
        ("the paper's clean", "0", "", f"{published.FILTERED_CLEAN}"),
        ("the paper's adversarials", f"{published.true_l2(l2):.2f} ({l2:g} in its unit)", "", f"{share}"),
        ("the paper's adversarials", f"{published.true_l2(far):.2f} ({far:g} in its unit)", f"{mean}", ""),
        ("Sitawarin & Wagner", f"{their_l2:g} (true L2)", f"{theirs}", ""),
    ):
        shares: list[Lines] = [("",)] * len(_THRESHOLDS)
        shares[_THRESHOLDS.index(0.5)] = (at_half,)
        rows.append([(images,), (distortion,), ("",), (credibility,), *shares])
    return rows


def _counts(results: Results, key: str, which: str) -> dict[float, int]:
    counts: Counter[float] = Counter()
    for run in results.runs.values():
        for value, count in run.get("credibility", {}).get(key, {}).get("dknn", {}).get(which, []):
            counts[value] += count
    return dict(sorted(counts.items()))
