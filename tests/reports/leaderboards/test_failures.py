"""Checks that tell a failed attack from a robust victim, on runs made by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_advknn.evaluation import Judged
from lightning_advknn.reports.leaderboards.attack_runs import AttackRun
from lightning_advknn.reports.leaderboards.checks import Check
from lightning_advknn.reports.leaderboards.failures import (
    Classified,
    Looked,
    attacks_move_images,
    clean_images_are_classified,
    gradients_are_there,
    same_in_other_batches,
    same_when_asked_again,
    successes_are_kept,
    surrogates_carry_over,
)

N = 100


def first(count: int) -> torch.Tensor:
    """Whether an image is among the first so many of 100."""
    return torch.arange(N) < count


def run_of(
    own: int = 0,
    victim: int = 0,
    changed: int = N,
    eps: float | None = 0.1,
    method: str = "origin",
    **more: Any,
) -> AttackRun:
    """A run that fools what it is on on the first `own` images, DkNN on the first `victim`, and leaves those
    from `changed` on."""
    far = first(changed).double() * (0.1 if eps is None else eps)
    settings = {} if eps is None else {"eps": eps}
    attack = {"function": "bim", "settings": settings}
    judged = {"dknn": Judged(first(victim), None)}
    meant = more.pop("meant", torch.ones(N, dtype=torch.bool))
    return AttackRun(
        f"bim, {method}", method, attack, "linf", eps, far, far, judged, first(own), meant, **more
    )


def test_images_that_no_one_moved() -> None:
    still = {"iterates": {"moved": first(20)}}
    check = attacks_move_images([run_of(own=20, changed=20, **still)])
    assert check.holds is False
    assert check.detail == "bim, origin at 0.1: 80 of the 80 images left are the clean ones"
    # 4 of 80 are few, and who looked elsewhere has tried.
    assert attacks_move_images([run_of(own=20, changed=96, **still)]).holds is True
    assert attacks_move_images([run_of(own=20, changed=95, **still)]).holds is False
    moved = {"iterates": {"moved": first(N)}}
    assert attacks_move_images([run_of(own=20, changed=20, **moved)]).holds is True
    # A minimum-norm attack returns what is wrong already, and what it was not to change.
    assert attacks_move_images([run_of(own=N, changed=20, eps=None, **still)]).holds is True
    assert attacks_move_images([run_of(own=20, changed=20, meant=first(20), **still)]).holds is True
    assert attacks_move_images([run_of(changed=0, eps=0.0, **still)]).holds is None
    assert attacks_move_images([run_of(own=20, changed=20)]).holds is None  # nothing noted


def test_images_without_gradients() -> None:
    positions = torch.arange(0, N, 2)

    def looked(zero: int, infinite: int = 0) -> dict[str, Looked]:
        """Of the 50 images, the last so many."""
        place = torch.arange(50)
        return {"origin": Looked(positions, place >= 50 - zero, place < infinite)}

    check = gradients_are_there([run_of(own=20)], looked(30))
    assert check.holds is False
    said = "bim, origin at 0.1: at 30 of 40 images left, of 50 looked at, the gradient of origin is none (30 zero, 0 not finite)"
    assert check.detail == said
    assert gradients_are_there([run_of(own=20)], looked(0, infinite=20)).holds is False
    assert gradients_are_there([run_of(own=20)], looked(2)).holds is True  # 5 % of those left
    assert gradients_are_there([run_of(own=20)], looked(3)).holds is False
    # An attack that fools them all the same, one that asks for no gradient, one through something else.
    assert gradients_are_there([run_of(own=N)], looked(30)).holds is True
    blind = run_of(own=20, iterates={"differentiated": torch.zeros(N, dtype=torch.bool)})
    assert gradients_are_there([blind], looked(30)).holds is True
    through = AttackRun(**{**vars(run_of(own=20, method="dknn")), "attack": {"through": "origin"}})
    assert gradients_are_there([through], looked(30)).holds is False
    assert gradients_are_there([run_of(method="dknn")], looked(30)).holds is None


def test_success_that_is_lost() -> None:
    check = successes_are_kept([run_of(own=20, iterates={"reached": first(27)})])
    assert (check.holds, check.detail) == (
        False,
        "bim, origin at 0.1: 7 of the 80 images left were fooling on the way",
    )
    assert successes_are_kept([run_of(own=20, iterates={"reached": first(25)})]).holds is True
    assert successes_are_kept([run_of(own=27, iterates={"reached": first(27)})]).holds is True
    assert successes_are_kept([run_of(own=20)]).holds is None


def test_surrogates_that_imitate_nothing() -> None:
    surrogate = {"method": "dknnb", "imitates": "dknn"}
    check = surrogates_carry_over([run_of(own=90, victim=10, **surrogate)])
    assert check.detail == "bim, dknnb at 0.1: of 90 images that fool it, dknn gets 80 right"
    assert check.holds is False
    assert surrogates_carry_over([run_of(own=90, victim=18, **surrogate)]).holds is True
    assert surrogates_carry_over([run_of(own=10, victim=0, **surrogate)]).holds is True  # of little weight
    few = run_of(own=4, **surrogate)
    few = replace(few, own=few.own[:12], meant=few.meant[:12], victims={"dknn": Judged(first(0)[:12], None)})
    assert surrogates_carry_over([few]).holds is True  # of 12 images four
    # At the largest eps it carries over; the backbone and minimum-norm attacks need not.
    series = [
        run_of(own=90, victim=10, eps=0.1, **surrogate),
        run_of(own=95, victim=90, eps=0.2, **surrogate),
    ]
    assert surrogates_carry_over(series).holds is True
    assert surrogates_carry_over(series[:1]).holds is False
    assert surrogates_carry_over([run_of(own=90)]).holds is None
    assert surrogates_carry_over([run_of(own=90, eps=None, **surrogate)]).holds is None


LABELS = torch.arange(4).repeat_interleave(25)
NAMES = ("apple", "pear", "plum", "fig")


def classify(classes: torch.Tensor, own_knn: torch.Tensor | None = LABELS) -> Check:
    return clean_images_are_classified(LABELS, {"origin": Classified(classes, own_knn)}, NAMES)


@pytest.mark.parametrize(("n", "right"), [(1, 1), (2, 2), (2, 1), (5, 4), (5, 2)])
def test_a_few_images_are_no_chance(n: int, right: int) -> None:
    """Two standard errors above chance are more than 100 % of two images."""
    labels = torch.arange(n) % 4
    classes = torch.where(torch.arange(n) < right, labels, (labels + 1) % 4)
    assert clean_images_are_classified(labels, {"kNN": Classified(classes, None)}, NAMES).holds is True


def test_networks_with_other_labels() -> None:
    assert classify(LABELS).holds is True
    shifted = classify((LABELS + 1) % 4)
    assert shifted.detail == (
        "origin: 0.00 % of clean images right, near chance (25.00 %); origin: 0.00 % of clean images right,"
        " the kNN on its own features 100.00 %"
    )
    # 20 points behind in all, or one class lost.
    wrong = LABELS.clone()
    wrong[[*range(5), *range(25, 30), *range(50, 55), *range(75, 79)]] += 4
    assert classify(wrong % 5).holds is True
    wrong[79] += 4
    assert classify(wrong % 5).holds is False
    lost = LABELS.where((LABELS != 1) | (torch.arange(N) % 2 == 1), 3)
    assert classify(lost).holds is True
    lost = LABELS.where((LABELS != 1) | (torch.arange(N) % 3 == 0), 3)
    assert classify(lost).detail == (
        "origin: 8 of 25 images of class 1 (pear) right, its kNN 25; most often it says 3 (fig)"
    )
    # A kNN that does no better is no reason.
    assert classify(lost, lost).holds is True


@pytest.mark.parametrize(("right", "holds"), [(33, False), (34, True)])
def test_near_chance(right: int, holds: bool) -> None:
    # Chance is 25 %; a tenth of the way is 32.5 %, two standard errors of 4.33 % are 33.66 %.
    classes = torch.full((N,), 4)
    classes[:right] = LABELS[:right]
    check = clean_images_are_classified(LABELS, {"kNN": Classified(classes, None)}, NAMES)
    assert check.holds is holds


def test_answers_that_depend_on_the_batch() -> None:
    assert same_in_other_batches({"clean images": first(0), "bim, origin": first(2)}).holds is True
    check = same_in_other_batches({"clean images": first(0), "bim, origin": first(3)})
    assert (check.holds, check.detail) == (False, "bim, origin: 3 of 100 images")
    assert same_in_other_batches({"clean images": first(1)[:12]}).holds is True
    assert same_in_other_batches({"clean images": first(2)[:12]}).holds is False
    assert same_in_other_batches({}).holds is None


def test_asked_again_in_their_order_images_get_the_very_same_votes() -> None:
    assert same_when_asked_again({"a": first(0), "b": first(0)[:50]}) == (
        "stored adversarials, queried again, get the same votes",
        True,
        "150 images",
    )
    check = same_when_asked_again({"a": first(0), "b": first(1)})
    assert (check.holds, check.detail) == (False, "b: 1 of 100 images")
    assert same_when_asked_again({}).holds is None
