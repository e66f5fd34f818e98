"""Checks that tell failed attacks and broken victims from robustness (Pintor et al., arXiv 2106.09947).

Each check explains why honest experiments stay below its threshold.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.reports.leaderboards.attack_runs import AttackRun
from lightning_advknn.reports.leaderboards.checks import MARGIN, Check, check_of, series_of

_FEW = 0.05  # share of images that may be odd
_BEHIND = 0.2  # accuracy by which a kNN may beat its own network; real ones are within a few points
_SOME = 5  # least number of images that a finding needs; below it, chance decides
_LOST = 0.5  # as _BEHIND, for one class, which has fewer images
# Share of images fooling a surrogate that must fool its victim: 86 % on Digits, 29 % on a small folder.
_CARRIED = 0.2
_ASKED_OTHERWISE = 0.02  # share of images at a tie that rounding decides, and other batches round differently


class Looked(NamedTuple):
    """Gradients at some clean images."""

    positions: Tensor
    """Of the images, int64 ``(n,)``."""
    zero: Tensor
    """Whether all of the gradient is zero, bool ``(n,)``."""
    infinite: Tensor
    """Whether some of it is not finite, bool ``(n,)``."""


class Classified(NamedTuple):
    """What a network or victim predicts for clean images, beside the kNN on its own features."""

    classes: Tensor
    """int64 ``(n,)``."""
    own_knn: Tensor | None
    """Classes int64 ``(n,)``; None of a victim, which is a kNN itself."""


def attacks_move_images(runs: Sequence[AttackRun]) -> Check:
    """Attacks must change the images that they fail on, or at least query their target elsewhere.

    An attack that leaves an image as it is has not tried: its gradient is zero or its step too small. Some
    attacks return the clean image when they fail, but query their target about others first. Up to `_FEW` of
    the failures, and `MARGIN` points of accuracy, may stay clean: an image that activates no unit has no
    gradient.
    """
    tried = [run for run in runs if "moved" in run.iterates and run.eps != 0]
    still = []
    for run in tried:
        same = run.left & (run.linf == 0) & ~run.iterates["moved"]
        count, left = int(same.sum()), int(run.left.sum())
        if count > _FEW * left and count > MARGIN / 100 * len(same):
            still.append(f"{run.name}: {count} of the {left} images left are the clean ones")
    return check_of("attacks change the images that they leave", len(tried), "attacks", still)


def gradients_are_there(runs: Sequence[AttackRun], looked: Mapping[str, Looked]) -> Check:
    """The target's cross-entropy must have a gradient at the clean images that an attack fails on.

    Saturated logits (times 100, say) have none in float32. Attacks with another loss or with random steps do
    not need it, which is why only failures count. Thresholds are as in `attacks_move_images`.

    Args:
        runs: Of all entries.
        looked: Gradients by what is differentiated.
    """
    found, blind = 0, []
    for run in runs:
        through = str(run.attack.get("through", run.method))
        if through not in looked:
            continue
        positions, zero, infinite = looked[through]
        left = run.left[positions]
        if "differentiated" in run.iterates:
            left = left & run.iterates["differentiated"][positions]
        count, found = int((left & (zero | infinite)).sum()), found + 1
        if count > max(1, _FEW * int(left.sum())):
            kinds = f"{int((left & zero).sum())} zero, {int((left & infinite).sum())} not finite"
            blind.append(
                f"{run.name}: at {count} of {int(left.sum())} images left, of {len(positions)} looked at,"
                f" the gradient of {through} is none ({kinds})"
            )
    return check_of("what attacks differentiate has gradients", found, "attacks", blind)


def successes_are_kept(runs: Sequence[AttackRun]) -> Check:
    """An image that the attack fails on must not have fooled the target on the way, within eps.

    An attack that keeps its best iterate has no such images. The last iterate of BIM and the like is seldom
    worse than an earlier one: on none of Digits' 547 images. If more than `_FEW` of all images are lost, the
    attack is weaker than it could be.
    """
    tried = [run for run in runs if "reached" in run.iterates]
    lost = []
    for run in tried:
        count = int((run.left & run.iterates["reached"]).sum())
        if count > max(1, _FEW * int(run.meant.sum())):
            left = int(run.left.sum())
            lost.append(f"{run.name}: {count} of the {left} images left were fooling on the way")
    return check_of("what fools on the way fools in the end", len(tried), "attacks", lost)


def surrogates_carry_over(runs: Sequence[AttackRun]) -> Check:
    """At least a share `_CARRIED` of the images that fool a surrogate must fool the victim that it imitates.

    Otherwise the victim's accuracy only says how bad the surrogate is. Only an attack's largest eps counts:
    the two decision boundaries differ, and small steps end between them. For the same reason minimum-norm
    attacks, which stop at the surrogate's boundary, do not count, nor does a gap below 10 points of accuracy
    or `_SOME` images. The backbone imitates nothing: the paper's row Origin is weak by design.
    """
    last = {id(series[-1]) for series in series_of(runs, "eps")}
    tried = [run for run in runs if run.imitates and id(run) in last]
    short = []
    for run in tried:
        fooled = run.own & run.meant
        kept = int((fooled & ~run.victims[str(run.imitates)].wrong).sum())
        if kept > (1 - _CARRIED) * int(fooled.sum()) and kept >= max(_SOME, 1 + int(0.1 * len(fooled))):
            count = int(fooled.sum())
            short.append(f"{run.name}: of {count} images that fool it, {run.imitates} gets {kept} right")
    return check_of("what fools a surrogate fools its victim too", len(tried), "attacks on surrogates", short)


def clean_images_are_classified(
    labels: Tensor, classified: Mapping[str, Classified], names: Sequence[str]
) -> Check:
    """Networks and victims must tell classes apart, networks about as well as a kNN on their features.

    A network with its outputs in another order than the data's labels, or trained on images of another scale,
    misclassifies clean images while its features still tell classes apart. Victims then look robust against
    attacks that need the network's outputs.

    An accuracy is near chance if it is at most a tenth of the way from always guessing the most frequent
    class to no error, or within two standard errors above that guess. A network is behind its kNN by
    `_BEHIND` in accuracy or by `_LOST` in the accuracy of one class. A finding needs at least `_SOME` images,
    or 8 of one class.

    Args:
        labels: int64 ``(n,)``.
        classified: By name.
        names: Of the classes.
    """
    counts, n = labels.bincount(minlength=len(names)), len(labels)
    chance = float(counts.max()) / n
    near = chance + max(0.1 * (1 - chance), 2 * (chance * (1 - chance) / n) ** 0.5)
    wrong = []
    for name, (classes, own_knn) in classified.items():
        right = classes == labels
        accuracy = f"{name}: {_share(right)} of clean images right"
        if float(right.double().mean()) <= near and int((~right).sum()) >= _SOME:
            wrong.append(f"{accuracy}, near chance ({100 * chance:.2f} %)")
        if own_knn is None:
            continue
        known = own_knn == labels
        if (ahead := int(known.sum()) - int(right.sum())) >= max(_SOME, _BEHIND * n):
            wrong.append(f"{accuracy}, the kNN on its own features {_share(known)}")
        elif ahead > 0:
            wrong += _lost_classes(name, labels, classes, known, names)
    return check_of("clean images are classified", len(classified), "networks and victims", wrong)


def same_in_other_batches(apart: Mapping[str, Tensor]) -> Check:
    """Images must get the same votes and classes one by one, seven at a time and in another order.

    They do not if the network uses batch statistics or chance. A vote or a class that depends on the last
    bits may
    differ: that of one image, or of a share `_ASKED_OTHERWISE`, of each run.

    Args:
        apart: By run, which of its images got another answer, bool ``(n,)``.
    """
    return _same("images get the same votes in other batches", apart, 1, _ASKED_OTHERWISE)


def same_when_asked_again(again: Mapping[str, Tensor]) -> Check:
    """Stored images, queried again in their order, must get the votes and classes of the rows.

    Args:
        again: By run, which of its images got another answer, bool ``(n,)``.
    """
    return _same("stored adversarials, queried again, get the same votes", again, 0, 0)


def _same(check: str, changed: Mapping[str, Tensor], few: int, share: float) -> Check:
    images = sum(len(each) for each in changed.values())
    other = [
        f"{name}: {int(each.sum())} of {len(each)} images"
        for name, each in changed.items()
        if int(each.sum()) > max(few, share * len(each))
    ]
    return check_of(check, images, "images", other)


def _lost_classes(
    name: str, labels: Tensor, classes: Tensor, known: Tensor, names: Sequence[str]
) -> list[str]:
    """Classes that a network confuses and its kNN knows, with what the network takes them for."""
    lost = []
    for label in torch.unique(labels).tolist():
        own = labels == label
        right, theirs = int((classes[own] == label).sum()), int(known[own].sum())
        if theirs - right >= max(8, _LOST * int(own.sum())):
            other = int(classes[own & (classes != label)].mode().values)
            lost.append(
                f"{name}: {right} of {int(own.sum())} images of class {label} ({names[label]}) right,"
                f" its kNN {theirs}; most often it says {other} ({names[other]})"
            )
    return lost


def _share(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.2f} %"
