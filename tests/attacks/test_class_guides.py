"""ASK, the soft 1-NN and kernels: their losses against plain loops, their steps against points worked by hand."""

import math

import numpy as np
import pytest
import torch

from lightning_advknn.attacks import ask, kernel_knn, soft_nearest
from lightning_advknn.attacks.ask import _similarity_logits
from lightning_advknn.attacks.kernel import _kernel_margins, _squared_widths
from lightning_advknn.attacks.parts import guide_distances as guided
from lightning_advknn.attacks.parts.descent import ascent, own_and_others
from lightning_advknn.attacks.parts.guide_distances import Guides
from lightning_advknn.attacks.parts.guides import nearest_in_each_layer
from lightning_advknn.classifiers import DkNN
from lightning_advknn.functional import l2_distortion, linf_distortion
from lightning_advknn.search import MemoryBank

# The victim's rows (see `hand_dknn`), two of each class.
ROWS = np.array([(0, 0), (0.1, 0), (0.2, 1), (1, 0), (0.9, 1), (1, 1)])
POINTS, LABELS = [(0.3, 0.4), (0.05, 0.1), (0.95, 0.8), (0.62, 0.45)], [0, 0, 2, 1]

# Short versions for two pixels.
ATTACKS = {
    "ask": lambda v, x, y, **s: ask(v, x, y, **{"eps": 0.5, "step_size": 0.1, "steps": 12, "m": 2, **s}),
    "soft_nearest": lambda v, x, y, **s: soft_nearest(
        v, x, y, **{"m": 2, "steps": 15, "refresh_every": 4, **s}
    ),
    "kernel_knn": lambda v, x, y, **s: kernel_knn(
        v, x, y, **{"m": 2, "steps": 40, "search_steps": 2, "lr": 0.05, "check_every": 20, **s}
    ),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def cosine_of(victim):
    """The same victim with cosine banks."""
    banks = {
        layer: MemoryBank(bank.features, bank.labels, bank.ids, bank.num_classes, "cosine")
        for layer, bank in victim.banks.items()
    }
    return DkNN.on_banks(victim.network, banks, victim.k)


@pytest.fixture(params=["euclidean", "cosine"])
def victim(request, hand_dknn):
    return hand_dknn if request.param == "euclidean" else cosine_of(hand_dknn)


def hand_images(device):
    return torch.tensor(POINTS, device=device)[:, None, None], torch.tensor(LABELS, device=device)


def vector(victim, layer, point):
    """Features as the attacks compare them, float64."""
    features = np.array(point if layer == "both" else point[1:], dtype=float)
    length = np.linalg.norm(features)
    return features / length if victim.banks[layer].metric == "cosine" and length else features


def square(victim, layer, point, row):
    """Squared distance of a point from a row of the bank; cosine gives a row of length zero the distance 1."""
    return ((vector(victim, layer, point) - vector(victim, layer, ROWS[row])) ** 2).sum() + (
        victim.banks[layer].metric == "cosine" and not vector(victim, layer, ROWS[row]).any()
    )


def test_the_nearest_in_each_layer_by_hand(hand_dknn, device):
    # From (.3, .4): in the plane (.1, 0) is nearer than (0, 0), (.2, 1) at .61 than (1, 0), (.9, 1) than (1,
    # 1).
    images, _ = hand_images(device)
    squares, rows = nearest_in_each_layer(hand_dknn, images[:1], 1)
    assert rows["both"].tolist() == [[[1], [2], [4]]]
    assert squares["both"].flatten().tolist() == pytest.approx([0.2, 0.37, 0.72])
    # In height those of class 1 are at 1 and 0; other ties are in the bank's order.
    assert rows["height"].tolist() == [[[0], [3], [4]]]
    assert squares["height"].flatten().tolist() == pytest.approx([0.16, 0.16, 0.36])


def test_squared_distances_of_unit_features(victim, device):
    images, _ = hand_images(device)
    squares, rows = nearest_in_each_layer(victim, images, 2)
    found = Guides(victim, rows).squared_distances(images)
    assert found.shape == (4, 2, 3, 2)
    for position, layer in enumerate(("both", "height")):
        torch.testing.assert_close(found[:, position].double(), squares[layer], rtol=0, atol=1e-6)
        for image, point in enumerate(POINTS):
            for row, distance in zip(
                rows[layer][image].flatten(), found[image, position].flatten(), strict=True
            ):
                assert distance.item() == pytest.approx(square(victim, layer, point, row), abs=1e-6)


def test_ascent_is_the_gradient_of_cross_entropy_and_does_not_vanish(device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(
        device
    )  # pixels, layers, classes
    images = torch.rand(5, 3, generator=generator, dtype=torch.float64).to(device)
    labels = torch.tensor([0, 1, 2, 3, 0], device=device)

    def logits_fn(images, factor=1.0):
        return factor * torch.einsum("bp,plc->blc", images.sin(), weight)

    leaf = images.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(5):
        for layer in range(2):
            scores = logits_fn(leaf)[i, layer]
            loss = loss - (scores[labels[i]].exp() / scores.exp().sum()).log()
    (expected,) = torch.autograd.grad(loss, leaf)
    found = ascent(logits_fn, images, labels)
    factors = found / expected
    torch.testing.assert_close(factors, factors[:, :1].expand(-1, 3))
    assert (factors > 0).all()
    own, others = own_and_others(logits_fn(images), labels)
    probability = 1 / (1 + (others - own).exp())
    torch.testing.assert_close(-probability.log().sum(), loss.detach())
    # Where the own class is some 1000 ahead, cross-entropy and its gradient are 0.
    sharp = ascent(lambda x: logits_fn(x.double(), 1000.0).float(), images.float(), labels)
    assert (sharp.abs().amax(1) > 0).all()


def ask_logits(victim, layer, point, rows):
    """Mean similarities over .1, cosines from the vectors' product."""
    logits = []
    for each in rows[layer]:
        if victim.banks[layer].metric == "cosine":
            similarities = [vector(victim, layer, point) @ vector(victim, layer, ROWS[row]) for row in each]
        else:
            similarities = [-math.sqrt(square(victim, layer, point, row)) for row in each]
        logits.append(np.mean(similarities) / 0.1)
    return logits


def ask_loss(victim, point, label, rows):
    """Sum over layers of the cross-entropy of these logits."""
    total = 0.0
    for layer in ("both", "height"):
        logits = ask_logits(victim, layer, point, rows)
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    return total


def test_logits_of_ask_are_the_plain_loop(victim, device):
    images, _ = hand_images(device)
    _, rows = nearest_in_each_layer(victim, images, 2)
    cosine = torch.tensor([bank.metric == "cosine" for bank in victim.banks.values()], device=device)
    found = _similarity_logits(Guides(victim, rows), cosine[:, None, None], 0.1, images)
    for image, point in enumerate(POINTS):
        for position, layer in enumerate(("both", "height")):
            expected = ask_logits(victim, layer, point, rows_of(victim, images, image))
            assert found[image, position].tolist() == pytest.approx(expected, abs=1e-4)


def soft_loss(victim, point, label, rows, temperature=1.0):
    """Sum over layers of -log p_y."""
    total = 0.0
    for layer in ("both", "height"):
        weights = np.array(
            [[math.exp(-square(victim, layer, point, r) / temperature) for r in each] for each in rows[layer]]
        )
        total -= math.log(weights[label].sum() / weights.sum())
    return total


def slope(loss, point):
    """Its gradient by central differences."""
    return np.array([(loss(point + h) - loss(point - h)) / 2e-6 for h in 1e-6 * np.eye(2)])


def rows_of(victim, images, image, m=2):
    return {
        layer: each[image].tolist() for layer, each in nearest_in_each_layer(victim, images, m)[1].items()
    }


def test_a_step_of_ask_goes_up_its_loss(victim, device):
    images, labels = hand_images(device)
    settings = {"eps": 0.05, "step_size": 0.01, "m": 2, "seed": 3}
    start = ask(victim, images, labels, steps=0, **settings)
    assert 0 < linf_distortion(images, start).max() <= 0.05 + 1e-6
    found = ask(victim, images, labels, steps=1, **settings)
    for image in range(4):
        # Guides are those of the clean image.
        rows, point = rows_of(victim, images, image), start[image].flatten().double().cpu().numpy()
        gradient = slope(lambda p, i=image, r=rows: ask_loss(victim, p, LABELS[i], r), point)
        assert np.abs(gradient).min() > 1e-4  # neither sign hangs on rounding
        clean = np.array(POINTS[image])
        expected = np.clip(point + 0.01 * np.sign(gradient), clean - 0.05, clean + 0.05)
        assert found[image].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_start_of_ask_is_that_of_its_seed(hand_dknn, device):
    images, labels = hand_images(device)
    starts = [ATTACKS["ask"](hand_dknn, images, labels, steps=0, eps=0.02, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    offsets = torch.stack(starts)[[0, 2]] - images
    assert offsets.min() < 0 < offsets.max()


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_a_step_of_the_soft_1nn_goes_up_its_loss(victim, device, temperature):
    images, labels = hand_images(device)
    labels = victim.predict(images)
    found = soft_nearest(victim, images, labels, steps=1, step_size=0.03, m=2, temperature=temperature)
    for image, label in enumerate(labels.tolist()):
        rows, point = rows_of(victim, images, image), np.array(POINTS[image])
        gradient = slope(lambda p, y=label, r=rows: soft_loss(victim, p, y, r, temperature), point)
        expected = point + 0.03 * gradient / np.linalg.norm(gradient)
        assert found[image].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_soft_1nn_stops_at_its_first_success(pixel_knn, device):
    # Class 0 along x = .2, class 1 along x = .8: the boundary is x = .5.
    heights = torch.linspace(0, 1, 21)
    columns = torch.cat([torch.stack([torch.full_like(heights, x), heights], 1) for x in (0.2, 0.8)])
    victim = pixel_knn(columns[:, None, None], torch.arange(42) // 21, 3)
    images = torch.tensor([[0.11, 0.5], [0.45, 0.4], [0.9, 0.3], [0.7, 0.5]], device=device)[:, None, None]
    labels = torch.tensor([0, 0, 1, 0], device=device)
    found = soft_nearest(victim, images, labels, m=5, step_size=0.04, steps=20, refresh_every=3)
    assert (victim.predict(found) != labels).all()
    assert torch.equal(found[3], images[3])  # wrong already
    norms = l2_distortion(images, found)
    for norm, distance in zip(norms.tolist(), (0.39, 0.05, 0.4), strict=False):
        assert distance <= norm <= distance + 0.05
    # It is where a shorter walk ends, all of whose ends before are no successes.
    for steps in range(1, 11):
        now = soft_nearest(victim, images, labels, m=5, step_size=0.04, steps=steps, refresh_every=3)
        done = victim.predict(now) != labels
        assert torch.equal(now[done], found[done])
    # Ten steps are the first that reach .39 and .4: all images by the last, and not before.
    assert done.all()
    before = soft_nearest(victim, images, labels, m=5, step_size=0.04, steps=9, refresh_every=3)
    assert (victim.predict(before) == labels).tolist() == [True, False, True, False]
    # Once all are done the victim is asked no more.
    victim.queries = 0
    soft_nearest(victim, images, labels, m=5, step_size=0.04, steps=20, refresh_every=3)
    assert victim.queries == 4 + 2 + 10 + 10


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_balls_and_the_unit_interval(victim, device, eps):
    images, labels = hand_images(device)
    found = ATTACKS["ask"](victim, images, labels, eps=eps)
    assert linf_distortion(images, found).max() <= eps + 1e-6
    assert 0 <= found.min() <= found.max() <= 1
    found = ATTACKS["soft_nearest"](victim, images, labels, eps=eps)
    assert l2_distortion(images, found).max() <= eps + 1e-6
    assert 0 <= found.min() <= found.max() <= 1
    found = ATTACKS["soft_nearest"](victim, images, labels, step_size=5.0)
    assert 0 <= found.min() <= found.max() <= 1


def test_kernels_are_the_double_loop(victim, device):
    images, labels = hand_images(device)
    squares, rows = nearest_in_each_layer(victim, images, 2)
    widths = _squared_widths(squares)
    found = _kernel_margins(Guides(victim, rows).squared_distances(images), widths.float(), labels)
    for image, point in enumerate(POINTS):
        own, others = [], []
        for position, layer in enumerate(("both", "height")):
            all_squares = sorted(
                square(victim, layer, point, row) for each in rows[layer][image].tolist() for row in each
            )
            width = max(all_squares[1] - all_squares[0], 1e-4 * all_squares[-1])
            assert widths[image, position].item() == pytest.approx(width, abs=1e-6)
            for label, each in enumerate(rows[layer][image].tolist()):
                kernels = [math.exp(-square(victim, layer, point, row) / width) for row in each]
                (own if label == LABELS[image] else others).extend(kernels)
        expected = math.log(np.mean(own)) - math.log(np.mean(others))
        assert found[image].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_kernels_find_the_boundary(pixel_knn, device):
    heights = torch.linspace(0, 1, 21)
    columns = torch.cat([torch.stack([torch.full_like(heights, x), heights], 1) for x in (0.2, 0.8)])
    victim = pixel_knn(columns[:, None, None], torch.arange(42) // 21, 3)
    images = torch.tensor([[0.15, 0.5], [0.45, 0.4], [0.9, 0.3], [0.7, 0.5]], device=device)[:, None, None]
    labels = torch.tensor([0, 0, 1, 0], device=device)
    settings = {"m": 5, "bandwidth": 4.0, "weight": 0.02, "steps": 100, "lr": 0.03, "search_steps": 6}
    found = kernel_knn(victim, images, labels, **settings, check_every=25)
    assert (victim.predict(found) != labels).all()
    assert torch.equal(found[3], images[3])  # wrong already
    for norm, distance in zip(l2_distortion(images, found).tolist(), (0.35, 0.05, 0.4), strict=False):
        assert distance <= norm <= 1.1 * distance + 0.02


@each_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(victim, device, attack, mode):
    images, labels = hand_images(device)
    expected = attack(victim, images, labels)
    assert expected.shape == images.shape
    assert expected.dtype == torch.float32
    assert not expected.requires_grad
    assert not torch.equal(expected, images)
    with mode():
        # Tensors made here are inference tensors, which autograd refuses.
        found = attack(victim, images + 0, labels + 0)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_attack
def test_leaves_nothing_behind(hand_dknn, device, attack):
    images, labels = hand_images(device)
    before = images.clone(), labels.clone()
    attack(hand_dknn, images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert all(p.grad is None and p.requires_grad for p in hand_dknn.parameters())


@each_attack
def test_an_image_does_not_depend_on_its_batch(hand_dknn, device, attack, monkeypatch):
    images, labels = hand_images(device)
    together = attack(hand_dknn, images, labels)
    monkeypatch.setattr(guided, "_AT_ONCE", {device.type: 3})
    torch.testing.assert_close(attack(hand_dknn, images, labels), together, rtol=0, atol=1e-5)


@each_attack
def test_no_images(hand_dknn, device, attack):
    images, labels = hand_images(device)
    assert attack(hand_dknn, images[:0], labels[:0]).shape == (0, 1, 1, 2)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("ask", "eps", -0.1, "Expected `eps` to be finite and at least 0"),
        ("ask", "steps", 1.5, "Expected `steps` to be a whole number"),
        ("ask", "m", 0, "Expected `m` to be at least 1"),
        ("ask", "temperature", 0, "Expected `temperature` to be above 0"),
        ("ask", "m", 3, "Expected at most 2 guides"),
        ("soft_nearest", "eps", math.inf, "Expected `eps` to be finite"),
        ("soft_nearest", "m", 0, "Expected `m` to be at least 1"),
        ("soft_nearest", "temperature", 0, "Expected `temperature` to be above 0"),
        ("soft_nearest", "refresh_every", 0, "Expected `refresh_every` to be at least 1"),
        ("soft_nearest", "step_size", math.nan, "Expected `step_size` to be finite"),
        ("kernel_knn", "m", 1, "Expected `m` to be at least 2"),
        ("kernel_knn", "bandwidth", 0, "Expected `bandwidth` to be above 0"),
        ("kernel_knn", "weight", 0, "Expected `weight` to be above 0"),
        ("kernel_knn", "steps", 0, "Expected `steps` to be at least 1"),
        ("kernel_knn", "check_every", 0, "Expected `check_every` to be at least 1"),
        ("kernel_knn", "search_steps", -1, "Expected `search_steps` to be finite and at least 0"),
    ],
)
def test_settings_out_of_range(hand_dknn, device, name, setting, value, message):
    images, labels = hand_images(device)
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](hand_dknn, images, labels, **{setting: value})
