"""Wang et al.'s attack: the exact minimum, against points worked by hand and every other attack on the digits."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_advknn import attacks
from lightning_advknn.attacks import qp
from lightning_advknn.attacks.parts.voronoi import exact_minimum, lower_bound
from lightning_advknn.attacks.wang import pixel_scale
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Digits
from lightning_advknn.functional import l2_distortion
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import MemoryBank


def points(*rows, device="cpu"):
    return torch.tensor(rows, device=device)[:, None, None]


@pytest.fixture
def corner(pixel_knn):
    """The cell of (1, .5) against (0, 0) and (0, 1), of another class: it ends in (.375, .5)."""
    return pixel_knn(points([0.0, 0.0], [0.0, 1.0], [1.0, 0.5]), torch.tensor([1, 1, 0]), 1, (0.3,), (0.5,))


def test_by_hand(corner, device):
    images, labels = points([0.0, 0.5], [0.8, 0.5], [0.9, 0.4], device=device), torch.tensor([1, 0, 1])
    found = qp(corner, images, labels.to(device))
    # The first goes to the corner; the second to the wall 2x + y = 1.25 or 2x - y = .25; the third is wrong
    # already.
    assert found[0].flatten().tolist() == pytest.approx([0.375, 0.5], abs=1e-4)
    assert l2_distortion(images, found)[1].item() == pytest.approx((1.6 + 0.5 - 1.25) / 5**0.5, abs=1e-4)
    assert torch.equal(found[2], images[2])
    assert (corner.predict(found) != labels.to(device)).all()
    assert found.dtype == torch.float32


def test_what_would_leave_the_unit_interval_goes_on_inside(pixel_knn, device):
    # The boundary is 4 x + y = 2.5; the nearest point of it from (.1, .95) has y above 1, that from (.62, .3)
    # none.
    victim = pixel_knn(points([0.1, 0.4], [0.9, 0.6]), torch.tensor([0, 1]), 1)
    images, labels = points([0.1, 0.95], [0.62, 0.3], device=device), torch.tensor([0, 1], device=device)
    distances = [(2.5 - 0.4 - 0.95) / 17**0.5, (2.48 + 0.3 - 2.5) / 17**0.5]
    bank = victim.banks["normalize"]
    endless = exact_minimum(bank.features, bank.labels, images.flatten(1), labels)
    assert endless.norms.tolist() == pytest.approx(distances)
    assert (images.flatten(1) + endless.perturbations).max() > 1
    distances[0] = math.hypot(0.275, 0.05)  # within [0, 1] the nearest is (.375, 1)
    exact = exact_minimum(bank.features, bank.labels, images.flatten(1), labels, 1.0, images.flatten(1))
    assert exact.norms.tolist() == pytest.approx(distances)
    found = qp(victim, images, labels)
    assert 0 <= found.min() <= found.max() <= 1
    assert (victim.predict(found) != labels).all()
    assert l2_distortion(images, found).tolist() == pytest.approx(distances, abs=1e-5)


def test_scale_of_normalised_pixels(pixel_knn, device):
    images = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    victim = pixel_knn(images, torch.tensor([0, 0, 1, 1, 2]), 1, mean=(0.3, 0.6), std=(0.5, 0.2))
    scale, shift = pixel_scale(victim, images.to(device))
    per_channel = torch.tensor([2.0, 5.0], dtype=torch.float64, device=device).repeat_interleave(9)
    torch.testing.assert_close(scale, per_channel, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift, -per_channel * torch.tensor([0.3, 0.6]).to(scale).repeat_interleave(9))
    # Without images, only black and white are looked at.
    torch.testing.assert_close(pixel_scale(victim, images[:0].to(device))[0], scale)
    # The victim agrees: none of the nearest is closer than the bisector bound, and the edge is where it
    # changes.
    queries = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(1)).to(device)
    labels, bank = victim.predict(queries), victim.banks["normalize"]
    features = victim.features(queries)["normalize"]
    exact = exact_minimum(bank.features, bank.labels, features, labels, scale)
    for factor, changed in ((0.999, False), (1.001, True)):
        moved = queries + factor * exact.perturbations.view_as(queries).float()
        inside = ((moved > 0) & (moved < 1)).flatten(1).all(1)
        assert inside.sum() > 1
        # Along the way to a corner, a step beyond may leave the cell again.
        wrong = victim.predict(moved[inside]) != labels[inside]
        assert not wrong.any() if not changed else wrong.any()


def test_victims_that_are_no_1nn_on_pixels(hand_dknn, pixel_knn, device):
    images, labels = points([0.2, 0.3], [0.4, 0.9], device=device), torch.tensor([0, 1], device=device)
    rows = points([0.0, 0.1], [0.0, 1.0], [1.0, 0.5])
    with pytest.raises(ValueError, match="Expected a victim of k = 1, but got one of k = 3"):
        qp(hand_dknn, images, labels)
    with pytest.raises(ValueError, match=r"Expected a Euclidean kNN of one layer.*\['normalize'\].*cosine"):
        qp(pixel_knn(rows, torch.tensor([0, 0, 1]), 1, metric="cosine"), images, labels)
    several = DkNN.on_banks(hand_dknn.network, hand_dknn.banks, k=1)
    with pytest.raises(ValueError, match=r"Expected a Euclidean kNN of one layer.*\['both', 'height'\]"):
        qp(several, images, labels)
    with pytest.raises(
        ValueError, match=r"pixels times one factor each plus a constant.*layers \['height'\].*euclidean"
    ):
        qp(several.only("height"), images, labels)
    with pytest.raises(ValueError, match="Expected int64 `labels`"):
        qp(several.only("both"), images, labels.int())
    bank = MemoryBank(torch.eye(2, device=device), labels, labels, 2, "euclidean")
    # Each of two features is of both pixels, but black and white do not show it; one pixel is not looked at.
    for weight in ([[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 0.0]]):
        mixing = nn.Linear(2, 2, bias=False)
        mixing.load_state_dict({"weight": torch.tensor(weight)})
        network = nn.Sequential(OrderedDict(flatten=nn.Flatten(), mix=mixing))
        victim = DkNN.on_banks(FeatureNetwork(network, ["mix"]).to(device), {"mix": bank}, 1)
        with pytest.raises(ValueError, match=r"layers \['mix'\]"):
            qp(victim, images, labels)


def test_no_images_and_no_gradients(corner, device):
    images, labels = points([0.0, 0.5], [0.8, 0.5], device=device), torch.tensor([1, 0], device=device)
    assert qp(corner, images[:0], labels[:0]).shape == (0, 1, 1, 2)
    expected = qp(corner, images, labels)
    with torch.inference_mode():
        assert torch.equal(qp(corner, images + 0, labels + 0), expected)


def test_a_victim_that_knows_one_class(pixel_knn, device):
    victim = pixel_knn(points([0.0, 0.1], [0.0, 1.0]), torch.tensor([1, 1]), 1)
    images = points([0.2, 0.3], device=device)
    assert torch.equal(qp(victim, images, torch.tensor([1], device=device)), images)


def through(victim):
    """A surrogate of a kNN on pixels: the nearest row of each class, softly."""
    bank = victim.banks["normalize"]

    def logits_fn(images):
        squares = torch.cdist(victim.network.features(images)["normalize"], bank.features).square()
        classes = [-squares[:, bank.labels == label] for label in range(bank.num_classes)]
        return torch.stack([each.logsumexp(1) for each in classes], 1)

    return logits_fn


ATTACKS = {
    "ask": {"eps": 0.4, "step_size": 0.05, "steps": 20},
    "soft_nearest": {"steps": 40, "m": 10},
    "kernel_knn": {"m": 10, "steps": 150, "search_steps": 2, "check_every": 50},
    "minimum_norm": {"neighbours": 30, "surrogate_steps": 20, "steps": 20},
}


@pytest.mark.parametrize("k", [1, 5])
def test_no_attack_on_the_digits_comes_out_below(pixel_knn, device, k):
    data = Digits()
    train, test = data.split("train"), data.split("test")
    victim = pixel_knn(train.images.float() / 255, train.labels, k, mean=(0.3,), std=(0.4,))
    images = test.images[:4].float().to(device) / 255
    bank, labels = victim.banks["normalize"], victim.predict(images)
    queries = victim.features(images)["normalize"]
    scale, _ = pixel_scale(victim, images)
    smallest = lower_bound(bank.features, bank.labels, queries, labels, k, scale)
    assert (smallest > 0).all()
    if k == 1:
        pixels = images.flatten(1)
        exact = exact_minimum(bank.features, bank.labels, queries, labels, scale, pixels).norms
        assert (smallest <= exact + 1e-9).all()
        smallest = exact
        found = qp(victim, images, labels)
        assert (victim.predict(found) != labels).all()
        norms = l2_distortion(images, found)
        assert (norms >= exact - 1e-5).all()
        assert (norms <= exact + 1e-4).all()
    for name, settings in ATTACKS.items():
        given = {"surrogate": through(victim)} if name == "minimum_norm" else {}
        found = getattr(attacks, name)(victim, images, labels, **settings, **given)
        fooled = victim.predict(found) != labels
        assert fooled.sum() > 2, name
        norms = l2_distortion(images, found)[fooled]
        assert (norms >= smallest[fooled] - 1e-5).all(), name
        assert (norms < 9 * smallest[fooled]).all(), name  # so that the bound is one
