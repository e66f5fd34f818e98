"""Whether what looks like robustness is a failed attack or a broken victim (Pintor et al., arXiv 2106.09947, and beyond).

Each check says with its threshold why honest experiments stay below it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_advknn.reports.leaderboards.attack_runs import AttackRun
from lightning_advknn.reports.leaderboards.checks import TOLERANCE, Check, check_of, series_of

FEW = 0.05  # share of images that may be odd
BEHIND = 0.2  # accuracy that a network's own kNN may be ahead of it: real ones lie within a few points of each other
SOME = 5  # images that have to say so at least: of fewer, chance decides
LOST = 0.5  # the same of one class, which has fewer images
CARRIED = 0.2  # share of what fools a surrogate that fools its victim too: 86 % on Digits, 29 % on a small folder at little eps
ASKED_OTHERWISE = (
    0.02  # share of images at a tie that rounding decides, which other batches compute otherwise
)


class Looked(NamedTuple):
    """Gradients at some clean images."""

    positions: Tensor
    """Of the images, int64 ``(n,)``."""
    zero: Tensor
    """Whether all of the gradient is zero, bool ``(n,)``."""
    infinite: Tensor
    """Whether some of it is not finite, bool ``(n,)``."""


class Classified(NamedTuple):
    """What something says of clean images, beside the kNN on its own features."""

    classes: Tensor
    """int64 ``(n,)``."""
    own_knn: Tensor | None
    """Classes int64 ``(n,)``; None of a victim, which is a kNN itself."""


def attacks_move_images(runs: Sequence[AttackRun]) -> Check:
    """Whether attacks change the images that they fail on, or at least look elsewhere.

    An attack that leaves an image as it is has not tried: its gradient is zero or its step too small. Some
    return the clean image of what they fail on, but ask their target about others first. Up to `FEW` of the
    images left, and `TOLERANCE` points of accuracy, may stay: an image that a few units see, none of them
    active, has no gradient.
    """
    tried = [run for run in runs if "moved" in run.iterates and run.eps != 0]
    still = []
    for run in tried:
        same = run.left & (run.linf == 0) & ~run.iterates["moved"]
        count, left = int(same.sum()), int(run.left.sum())
        if count > FEW * left and count > TOLERANCE / 100 * len(same):
            still.append(f"{run.name}: {count} of the {left} images left are the clean ones")
    return check_of("attacks change the images that they leave", len(tried), "attacks", still)


def gradients_are_there(runs: Sequence[AttackRun], looked: Mapping[str, Looked]) -> Check:
    """Whether the cross-entropy of what attacks differentiate has a gradient at the clean images that they leave.

    Saturated logits (times 100, say) have none in float32. It does no harm to attacks with another loss or on
    random ways, which is why only images that are left count. Thresholds are as in `attacks_move_images`.

    Args:
        runs: Of all entries.
        looked: By what is differentiated.
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
        if count > max(1, FEW * int(left.sum())):
            kinds = f"{int((left & zero).sum())} zero, {int((left & infinite).sum())} not finite"
            blind.append(
                f"{run.name}: at {count} of {int(left.sum())} images left, of {len(positions)} looked at, the gradient of {through} is"
                f" none ({kinds})"
            )
    return check_of("what attacks differentiate has gradients", found, "attacks", blind)


def successes_are_kept(runs: Sequence[AttackRun]) -> Check:
    """Whether an image that is left was never found fooling on the way, within eps.

    An attack that keeps its best iterate leaves none such. The last iterate of BIM and the like seldom falls
    back: on none of Digits' 547 images. More than `FEW` of all images is a last iterate that is not what it
    could be.
    """
    tried = [run for run in runs if "reached" in run.iterates]
    lost = []
    for run in tried:
        count = int((run.left & run.iterates["reached"]).sum())
        if count > max(1, FEW * int(run.meant.sum())):
            lost.append(
                f"{run.name}: {count} of the {int(run.left.sum())} images left were fooling on the way"
            )
    return check_of("what fools on the way fools in the end", len(tried), "attacks", lost)


def surrogates_carry_over(runs: Sequence[AttackRun]) -> Check:
    """Whether what fools a surrogate also fools the victim that it imitates, at least a `CARRIED` share of it.

    Without that, the victim's accuracy says how bad the surrogate is. Of each attack the largest eps counts,
    as the two boundaries are not in one place and small steps end between them; for the same reason
    minimum-norm attacks, which stop at the surrogate's, do not. Nor does what is less than 10 points of
    accuracy or `SOME` images. The backbone imitates nothing: the paper's row Origin is by design.
    """
    last = {id(series[-1]) for series in series_of(runs, "eps")}
    tried = [run for run in runs if run.imitates and id(run) in last]
    short = []
    for run in tried:
        fooled = run.own & run.meant
        kept = int((fooled & ~run.victims[str(run.imitates)].wrong).sum())
        if kept > (1 - CARRIED) * int(fooled.sum()) and kept >= max(SOME, 1 + int(0.1 * len(fooled))):
            short.append(
                f"{run.name}: of {int(fooled.sum())} images that fool it, {run.imitates} gets {kept} right"
            )
    return check_of("what fools a surrogate fools its victim too", len(tried), "attacks on surrogates", short)


def clean_images_are_classified(
    labels: Tensor, classified: Mapping[str, Classified], names: Sequence[str]
) -> Check:
    """Whether networks and victims tell classes apart, and networks do so about as well as a kNN on their own features.

    A network whose labels are in another order than the data's, or whose images are scaled otherwise than in
    its training, is wrong on clean images, while its features still tell classes apart: victims look robust
    under attacks that need its labels.

    Near chance is what is at most a tenth of the way from always guessing the most frequent class to no
    error, or two standard errors above that guess. Behind its kNN is a network by `BEHIND` in accuracy or by
    `LOST` in that of a class. At least `SOME` images have to say so, and 8 of a class.

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
        accuracy = _share(right)
        if float(right.double().mean()) <= near and int((~right).sum()) >= SOME:
            wrong.append(f"{name}: {accuracy} of clean images right, near chance ({100 * chance:.2f} %)")
        if own_knn is None:
            continue
        known = own_knn == labels
        if (ahead := int(known.sum()) - int(right.sum())) >= max(SOME, BEHIND * n):
            wrong.append(
                f"{name}: {accuracy} of clean images right, the kNN on its own features {_share(known)}"
            )
        elif ahead > 0:
            wrong += _lost_classes(name, labels, classes, known, names)
    what = "networks and victims"
    return check_of("clean images are classified", len(classified), what, wrong)


def same_in_other_batches(compared: Mapping[str, tuple[int, int]]) -> Check:
    """Whether images get the same votes and classes alone, seven at a time and in another order.

    Not so if the network uses batch statistics or chance. A vote or a class that hangs on the last bits may
    differ: up to one image, or `ASKED_OTHERWISE`, of each run.

    Args:
        compared: By run, how many images were asked about again, and of how many the answer was another.
    """
    images = sum(asked for asked, _ in compared.values())
    other = [
        f"{name}: {n} of {asked} images"
        for name, (asked, n) in compared.items()
        if n > max(1, ASKED_OTHERWISE * asked)
    ]
    return check_of("images get the same votes in other batches", images, "images", other)


def same_when_asked_again(compared: Mapping[str, tuple[int, int]]) -> Check:
    """Whether stored images, asked about again in their order, give what the records were made of.

    Args:
        compared: By run, how many images were asked about again and how many of them got other votes or
            another class.
    """
    images = sum(asked for asked, _ in compared.values())
    other = [f"{name}: {n} of {asked} images" for name, (asked, n) in compared.items() if n]
    return check_of("stored adversarials, queried again, get the same votes", images, "images", other)


def _lost_classes(
    name: str, labels: Tensor, classes: Tensor, known: Tensor, names: Sequence[str]
) -> list[str]:
    """Classes that a network does not know and its kNN does, and what it takes them for."""
    lost = []
    for label in torch.unique(labels).tolist():
        own = labels == label
        right, theirs = int((classes[own] == label).sum()), int(known[own].sum())
        if theirs - right >= max(8, LOST * int(own.sum())):
            other = int(classes[own & (classes != label)].mode().values)
            lost.append(
                f"{name}: {right} of {int(own.sum())} images of class {label} ({names[label]}) right, its kNN {theirs}; most often it"
                f" says {other} ({names[other]})"
            )
    return lost


def _share(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.2f} %"
