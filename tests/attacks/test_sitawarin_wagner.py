"""Sitawarin and Wagner's attacks on points worked by hand (`hand_dknn` and `plane_knn` in conftest), and on digits."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_advknn import attacks
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.attacks.parts import guide_distances as guided
from lightning_advknn.attacks.parts.guide_distances import Guides
from lightning_advknn.attacks.sitawarin_wagner import _soft_vote_loss
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Digits
from lightning_advknn.evaluation import perturb
from lightning_advknn.functional import l2_distortion
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search.build import build_banks

# Short versions that leave nothing to chance on two pixels.
SETTINGS = {
    "sitawarin_wagner_linf": {"eps": 0.6, "m": 2, "steps": 40, "check_every": 20},
    "sitawarin_wagner_l2": {"eps": 0.8, "m": 2, "steps": 40, "check_every": 20},
    "sitawarin_wagner_knn": {"m": 2, "search_steps": 3, "steps": 40, "check_every": 20},
    "sitawarin_wagner_baseline": {"eps": 0.9, "steps": 40, "check_every": 20},
    "sitawarin_wagner_mean": {},
    "sitawarin_wagner_minimum_norm": {
        "m": 4,
        "search_steps": 3,
        "steps": 40,
        "lr": 0.03,
        "refresh_every": 20,
    },
}
each_attack = pytest.mark.parametrize("name", SETTINGS)
# The victim's rows (see `hand_dknn`) with labels 0 0 1 1 2 2.
ROWS = np.array([(0, 0), (0.1, 0), (0.2, 1), (1, 0), (0.9, 1), (1, 1)])
POINTS, LABELS = [(0.05, 0.1), (0.95, 0.9), (0.9, 0.95), (0.1, 0.05)], [0, 2, 2, 0]


def run(name, victim, images, labels, **settings):
    return getattr(attacks, name)(victim, images, labels, **{**SETTINGS[name], **settings})


def hand_images(device):
    images = torch.tensor(POINTS, device=device)[:, None, None]
    return images, torch.tensor(LABELS, device=device)


@pytest.fixture
def problem(hand_dknn, plane_knn, device):
    """By an attack's name a victim, images and labels: DkNN, but for the heuristics a kNN with k = 1."""

    def make(name):
        if name not in ("sitawarin_wagner_mean", "sitawarin_wagner_baseline"):
            return hand_dknn, *hand_images(device)
        points, labels = [(0.3, 0.2), (0.7, 0.8), (0.2, 0.3), (0.9, 0.9)], [0, 1, 0, 1]
        victim = plane_knn([(0.1, 0.1, 0), (0.2, 0.1, 0), (0.8, 0.9, 1), (0.9, 0.8, 1)], 1)
        images = torch.tensor(points, device=device)[:, None, None]
        return victim, images, torch.tensor(labels, device=device)

    return make


@pytest.mark.parametrize("steepness", [4.0, 1.5])
def test_the_loss_is_the_double_loop(hand_dknn, device, steepness):
    images, _ = hand_images(device)
    rows = torch.tensor([[2, 3], [3, 2], [0, 5], [4, 1]], device=device)
    radii = torch.tensor([0.9, 0.3], device=device)
    found = _soft_vote_loss(Guides(hand_dknn, rows).squared_distances(images), radii, steepness)
    for image, point in enumerate(POINTS):
        expected = 0.0
        for row in rows[image].tolist():
            both, height = math.dist(point, ROWS[row]), abs(point[1] - ROWS[row][1])
            for eta, distance in ((0.9, both), (0.3, height)):
                expected -= 1 / (1 + math.exp(-steepness * (eta - distance)))
        assert found[image].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sitawarin_wagner_linf", "sitawarin_wagner_l2", "sitawarin_wagner_knn"])
def test_the_first_step_descends_the_double_loop(hand_dknn, device, name):
    # Adam's first step is of length lr in each variable, against the gradient's sign.
    images, labels = hand_images(device)
    images[0, 0, 0, 0] = 0.45  # its nearest wrong class is 1, one row of which is left of it: signs differ

    def eta(position):
        coordinates = ROWS if position == 0 else ROWS[:, 1:]
        distances = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2)
        return np.sort(distances, axis=1)[:, 3].mean()  # beside itself, the third

    def loss(point, rows):
        total = 0.0
        for row in rows:
            total -= 1 / (1 + math.exp(-4 * (eta(0) - math.dist(point, ROWS[row]))))
            total -= 1 / (1 + math.exp(-4 * (eta(1) - abs(point[1] - ROWS[row][1]))))
        return total

    settings = {"steps": 1, "lr": 0.01, "eps": 0.08} if "knn" not in name else {"steps": 1, "lr": 0.01}
    settings |= {"search_steps": 1} if "knn" in name else {}
    found = run(name, hand_dknn, images, labels, **settings).flatten(1).tolist()
    signs = set()
    for image, (point, label) in enumerate(zip(images.flatten(1).tolist(), LABELS, strict=True)):
        means = {
            c: np.mean([math.dist(point, ROWS[2 * c]), math.dist(point, ROWS[2 * c + 1])])
            for c in range(3)
            if c != label
        }
        wrong = min(means, key=means.__getitem__)
        for axis in (0, 1):
            step = np.eye(2)[axis] * 1e-6
            slope = loss(point + step, (2 * wrong, 2 * wrong + 1)) - loss(
                point - step, (2 * wrong, 2 * wrong + 1)
            )
            low, high = (max(0, point[axis] - 0.08), min(1, point[axis] + 0.08)) if "linf" in name else (0, 1)
            centre, half = (high + low) / 2, (high - low) / 2
            variable = math.atanh((point[axis] - centre) / half) - 0.01 * np.sign(slope)
            assert found[image][axis] == pytest.approx(centre + half * math.tanh(variable), abs=1e-6)
            signs.add((axis, np.sign(slope)))
    assert len(signs) == 4


@each_attack
def test_the_victim_is_fooled_as_asked_again(problem, name):
    victim, images, labels = problem(name)
    with torch.no_grad():
        assert torch.equal(victim.predict(images), labels)
        adversarial = run(name, victim, images, labels)
        assert (victim.predict(adversarial) != labels).all()
    assert adversarial.shape == images.shape
    assert adversarial.dtype == torch.float32
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    eps, distances = SETTINGS[name].get("eps"), (adversarial - images).flatten(1)
    if "linf" in name:
        assert distances.abs().max() <= eps + 2.0**-24
    elif eps:
        assert distances.norm(dim=1).max() <= eps + 1e-6


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("name", [name for name in SETTINGS if "eps" in SETTINGS[name]])
def test_balls_and_the_unit_interval_bind(hand_dknn, device, name, eps):
    # Too small to fool, so that all of the ball is used.
    images, labels = hand_images(device)
    distances = run(name, hand_dknn, images, labels, eps=eps, steps=100) - images
    largest = distances.flatten(1).norm(dim=1) if "linf" not in name else distances.flatten(1).abs().amax(1)
    assert (largest <= eps * (1 + 1e-5)).all()
    assert (largest >= 0.95 * eps).all()


@pytest.mark.parametrize(("eps", "fooled"), [(0.19, False), (0.22, True)])
@pytest.mark.parametrize(
    "name", ["sitawarin_wagner_linf", "sitawarin_wagner_l2", "sitawarin_wagner_baseline"]
)
def test_a_boundary_between_two_points_is_crossed_where_it_is(plane_knn, device, name, eps, fooled):
    # x = .3 between .2 and .8: the boundary is .2 away.
    victim = plane_knn([(0.2, 0.5, 0), (0.8, 0.5, 1), (0.1, 0.5, 0), (0.9, 0.5, 1)], 1)
    images = torch.tensor([[[[0.3, 0.5]]]], device=device)
    settings = {"lr": 0.1 if "linf" in name else 0.02, **({"m": 1} if "baseline" not in name else {})}
    adversarial = run(
        name, victim, images, torch.zeros(1, device=device).long(), eps=eps, steps=150, **settings
    )
    assert (victim.predict(adversarial).item() == 1) is fooled
    assert adversarial[0, 0, 0, 0].item() == pytest.approx(0.3 + eps, abs=2e-3)


def test_the_knn_form_finds_a_small_perturbation(plane_knn, device):
    # The boundary is .2 away; many values of c come close.
    victim = plane_knn([(0.2, 0.5, 0), (0.8, 0.5, 1), (0.1, 0.5, 0), (0.9, 0.5, 1)], 1)
    images, labels = torch.tensor([[[[0.3, 0.5]]]], device=device), torch.zeros(1, device=device).long()
    sizes = []
    for search_steps in (2, 10):
        settings = {"m": 1, "search_steps": search_steps, "steps": 60, "check_every": 10}
        adversarial = run("sitawarin_wagner_knn", victim, images, labels, **settings)
        assert victim.predict(adversarial).item() == 1
        sizes.append((adversarial - images).norm().item())
    assert sizes[0] > sizes[1] >= 0.2 * (1 - 1e-6)
    assert sizes[1] < 0.21


@each_attack
def test_configurations_can_name_it(name):
    settings = AttackSettings(name, SETTINGS[name])
    assert settings.on_victim
    settings.bind()


@each_attack
def test_the_victim_is_asked_seldom(problem, name):
    victim, images, labels = problem(name)
    run(name, victim, images, labels)
    # Every 20 of 40 steps; so for three weights, or once more at the start; all the way and five bisections.
    expected = {"knn": 6, "minimum_norm": 7, "mean": 6}.get(name.removeprefix("sitawarin_wagner_"), 2)
    assert victim.queries == 4 * expected
    run(name, victim, images, labels, **({"steps": 41} if name != "sitawarin_wagner_mean" else {}))
    more = {"knn": 9, "minimum_norm": 10, "mean": 6}.get(name.removeprefix("sitawarin_wagner_"), 3)
    assert victim.queries == 4 * (expected + more)


@each_attack
def test_an_image_does_not_depend_on_its_batch(problem, device, name, monkeypatch):
    victim, images, labels = problem(name)
    together = run(name, victim, images, labels)
    monkeypatch.setattr(guided, "_AT_ONCE", {device.type: 3})
    torch.testing.assert_close(run(name, victim, images, labels), together, rtol=0, atol=1e-5)
    alone = run(name, victim, images[1:2], labels[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-5)


@each_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(problem, name, mode):
    victim, images, labels = problem(name)
    expected = run(name, victim, images, labels)
    assert not expected.requires_grad
    with mode():
        found = run(name, victim, images + 0, labels + 0)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


@each_attack
def test_leaves_nothing_behind(problem, name):
    victim, images, labels = problem(name)
    kept_images, kept_labels = images.clone(), labels.clone()
    run(name, victim, images, labels)
    assert all(p.grad is None and p.requires_grad for p in victim.network.parameters())
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)


@each_attack
def test_no_images(problem, name):
    victim, images, labels = problem(name)
    assert run(name, victim, images[:0], labels[:0]).shape == (0, 1, 1, 2)
    assert victim.queries == 0


@pytest.mark.parametrize("name", [name for name in SETTINGS if "steps" in SETTINGS[name]])
def test_no_steps(hand_dknn, device, name):
    images, labels = hand_images(device)
    assert torch.equal(run(name, hand_dknn, images, labels, steps=0), images)


BAD = {
    "eps": (-0.1, math.nan, math.inf),
    "m": (0, -1, 1.5),
    "weight": (-1, math.nan),
    "steepness": (-1, math.inf),
    "steps": (-1, 2.5),
    "search_steps": (-1, 0.5),
    "lr": (-0.1, math.nan),
    "check_every": (0, 1.5),
    "refresh_every": (0, 1.5),
}


@each_attack
def test_bad_settings(problem, name):
    victim, images, labels = problem(name)
    defaults = getattr(attacks, name).__kwdefaults__ or {}
    for setting in {*defaults, *SETTINGS[name]}:
        for value in BAD[setting]:
            # Said of no images, too: before any work.
            with pytest.raises(ValueError, match=f"Expected `{setting}` to be .*, but got {value}"):
                run(name, victim, images[:0], labels[:0], **{setting: value})


@each_attack
def test_bad_images_and_labels(problem, name):
    victim, images, labels = problem(name)
    with pytest.raises(ValueError, match=r"Expected finite images in \[0, 1\]"):
        run(name, victim, images + 1, labels)
    with pytest.raises(ValueError, match=r"Expected int64 `labels` of shape \(4,\)"):
        run(name, victim, images, labels[:3])


@pytest.mark.parametrize("name", [name for name in SETTINGS if "m" in SETTINGS[name]])
def test_more_guides_than_a_class_has(hand_dknn, device, name):
    with pytest.raises(
        ValueError, match=r"Expected at most 2 guides \(training images of class 0\), but got 3"
    ):
        run(name, hand_dknn, *hand_images(device), m=6 if "minimum" in name else 3)


@pytest.fixture(scope="module")
def digits():
    """A DkNN (k = 15) on the digits, on pixels and on the layers of a small trained network, and 24 images it gets right."""
    data = Digits()
    data.prepare_data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    train = data.split("train").__getitems__(range(850))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train.images), train.labels).backward()
        optimizer.step()
    network = FeatureNetwork(network, ["0", "2", "3"]).eval()
    dknn = DkNN.on_banks(network, build_banks(network, data.loader("train"), 10), k=15)
    images, labels, _ = data.split("test").__getitems__(range(40))
    with torch.no_grad():
        right = (dknn.predict(images) == labels) & (dknn.only("0").predict(images) == labels)
    return dknn, images[right][:24], labels[right][:24]


def attacked(digits, name, layer=None, **settings):
    """How many of the 24 are right after an attack, and its mean L2."""
    dknn, images, labels = digits
    victim = dknn.only(layer) if layer else dknn
    adversarial = perturb(lambda *given: getattr(attacks, name)(*given, **settings), victim, images, labels)
    with torch.no_grad():
        right = (victim.predict(adversarial) == labels).sum().item()
    return right, l2_distortion(images, adversarial).mean().item()


def test_digits_fall_to_guides_and_less_to_the_baseline(digits):
    assert len(digits[1]) == 24
    short = {"steps": 60, "check_every": 30}
    weak, _ = attacked(digits, "sitawarin_wagner_linf", eps=0.02, m=15, **short)
    strong, _ = attacked(digits, "sitawarin_wagner_linf", eps=0.25, m=15, **short)
    assert strong < 3 < 18 < weak
    within, size = attacked(digits, "sitawarin_wagner_l2", eps=2.5, m=40, **short)
    baseline, _ = attacked(digits, "sitawarin_wagner_baseline", eps=2.5, **short)
    assert size <= 2.5
    assert within < baseline  # the paper's 17 % beside 50 %


def test_digits_on_pixels_fall_to_smaller_perturbations_the_better_the_attack(digits):
    left, mean = attacked(digits, "sitawarin_wagner_mean", "0")
    assert left == 0
    left, knn = attacked(digits, "sitawarin_wagner_knn", "0", m=15, steps=60, check_every=20)
    assert left == 0
    settings = {"m": 20, "steps": 80, "lr": 0.03, "refresh_every": 40}
    left, smallest = attacked(digits, "sitawarin_wagner_minimum_norm", "0", **settings)
    assert left == 0
    assert smallest < knn < mean  # as the two papers find
