"""Guides against brute force in float64, on random features and on points worked by hand (`hand_dknn` in conftest)."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_advknn.attacks.parts import guide_distances as guided
from lightning_advknn.attacks.parts.guide_distances import (
    Guides,
    attack_in_batches,
    images_at_once,
    typical_radii,
)
from lightning_advknn.attacks.parts.guides import (
    as_lengths,
    nearest_of_classes,
    nearest_wrong_class,
)
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.build import BankSettings, build_banks


def random_victim(device, metric, k=5):
    """A DkNN of two layers on 60 random images of 4 classes, and 7 images to attack."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    network = FeatureNetwork(network, ["2", "3"]).eval().to(device)
    images, queries = (torch.rand(n, 3, 2, 2, generator=generator) for n in (60, 7))
    labels = torch.arange(60) % 4
    banks = build_banks(network, [Batch(images, labels, torch.arange(60))], 4, BankSettings(metric))
    return DkNN.on_banks(network, banks, k).to(device), queries.to(device)


def vectors(features, metric):
    """float64, of unit length for cosine."""
    features = features.double().cpu().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True) if metric == "cosine" else features


each_metric = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


@each_metric
def test_distances_to_guides_agree_with_brute_force(device, metric):
    victim, images = random_victim(device, metric)
    rows = torch.randint(60, (7, 6), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        found = Guides(victim, rows).squared_distances(images)
    assert found.shape == (7, 2, 6)
    features = victim.features(images)
    for position, layer in enumerate(victim.layers):
        own, bank = vectors(features[layer], metric), vectors(victim.banks[layer].features, metric)
        for image in range(7):
            for guide in range(6):
                expected = ((own[image] - bank[rows[image, guide].item()]) ** 2).sum()
                assert found[image, position, guide].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@each_metric
def test_distances_have_the_gradient_of_finite_differences(device, metric):
    victim, images = random_victim(device, metric)
    victim.double()
    for bank in victim.banks.values():
        bank.features = bank.features.double()
    network = victim.network.network

    class InDouble(nn.Module):
        layers = victim.layers

        def features(self, images):
            hidden = network[2](network[1](images.flatten(1)))
            return {"2": hidden, "3": network[3](hidden)}

    guides = Guides(victim, torch.arange(14, device=device).view(7, 2))
    guides._network = InDouble()
    leaf = images.double().requires_grad_()
    assert torch.autograd.gradcheck(guides.squared_distances, leaf)


def test_a_vector_of_zeros_is_as_far_from_all_as_the_bank_has_it(device):
    victim, images = random_victim(device, "cosine")
    with torch.no_grad():
        for parameter in victim.network.network[1].parameters():
            parameter.zero_()
    leaf = images.requires_grad_()
    distances = Guides(victim, torch.zeros(7, 3, dtype=torch.int64, device=device)).squared_distances(leaf)
    (gradient,) = torch.autograd.grad(distances.sum(), leaf)
    assert (distances[:, 0] == 2).all()
    bank = victim.banks["2"]
    own, _ = bank.search(torch.zeros(7, 9, device=device), 1)
    assert (as_lengths(bank, own) ** 2 - 2).abs().max() < 1e-12
    assert torch.isfinite(gradient).all()


@each_metric
def test_the_nearest_wrong_class_agrees_with_brute_force(device, metric):
    victim, images = random_victim(device, metric)
    labels = torch.arange(7, device=device) % 4
    for layer in victim.layers:
        bank, features = victim.banks[layer], victim.features(images)[layer]
        wrong, rows = nearest_wrong_class(bank, features, labels, 3)
        own = nearest_of_classes(bank, features, labels, 3)
        stored, queries = vectors(bank.features, metric), vectors(features, metric)
        chosen = set()
        for image, label in enumerate(labels.tolist()):
            distances = np.linalg.norm(stored - queries[image], axis=1)
            nearest = {c: sorted(range(c, 60, 4), key=distances.__getitem__)[:3] for c in range(4)}
            others = [c for c in range(4) if c != label]
            best = min(others, key=lambda c: distances[nearest[c]].mean())
            assert wrong[image].item() == best
            assert rows[image].tolist() == nearest[best]
            assert own[image].tolist() == nearest[label]
            chosen.add(best)
        assert len(chosen) > 1


def test_guides_by_hand(hand_dknn, device):
    # From (0, .1), class 0: class 1 is at .92 and 1.00 on average .96, class 2 at 1.27 and 1.35.
    # From (.6, .6), class 2: class 0 is at .85 and .78, class 1 at .57 and .72.
    points, labels = torch.tensor([[0, 0.1], [0.6, 0.6]], device=device), torch.tensor([0, 2], device=device)
    bank = hand_dknn.banks["both"]
    wrong, rows = nearest_wrong_class(bank, points, labels, 2)
    assert wrong.tolist() == [1, 1]
    assert rows.tolist() == [[2, 3], [2, 3]]
    assert nearest_of_classes(bank, points, labels, 2).tolist() == [[0, 1], [4, 5]]
    # The nearest of one row each: (1, 0) at .4 from (.6, 0) beats (.2, 1); for class 1, (.1, 0) at .5.
    points = torch.tensor([[0.6, 0.0], [0.6, 0.0]], device=device)
    wrong, rows = nearest_wrong_class(bank, points, torch.tensor([0, 1], device=device), 1)
    assert wrong.tolist() == [1, 0]
    assert rows.tolist() == [[3], [1]]
    # Rows that tie come in the bank's order: in height, those of each class at y = 0 and 1.
    heights = torch.tensor([[0.5], [0.4]], device=device)
    rows = nearest_of_classes(hand_dknn.banks["height"], heights, torch.tensor([1, 2], device=device), 2)
    assert rows.tolist() == [[2, 3], [4, 5]]


def test_too_many_guides(hand_dknn, device):
    points = torch.zeros(1, 2, device=device)
    with pytest.raises(ValueError, match=r"at most 2 guides \(training images of class 0\), but got 3"):
        nearest_wrong_class(hand_dknn.banks["both"], points, torch.zeros(1, device=device).long(), 3)


def test_typical_radii_by_hand(hand_dknn):
    # Squared distances of each row to its third neighbour beside itself:
    # both: (0, 0): .01 1 1.04 | (.1, 0): .01 .81 1.01 | (.2, 1): .49 .64 1.01
    #       (1, 0): .81 1 1 | (.9, 1): .01 .49 1.01 | (1, 1): .01 .64 1
    # height: of three rows at 0 and three at 1, the third other one is 1 away.
    both = np.sqrt([1.04, 1.01, 1.01, 1, 1.01, 1]).mean()
    assert typical_radii(hand_dknn).tolist() == pytest.approx([both, 1], rel=1e-6)


def test_typical_radii_are_measured_once_for_each_bank_and_k(hand_dknn, monkeypatch):
    first, search, searched = typical_radii(hand_dknn), MemoryBank.search, []

    def counted(self, queries, k, own_ids=None):
        searched.append(k)
        return search(self, queries, k, own_ids)

    monkeypatch.setattr(MemoryBank, "search", counted)
    assert torch.equal(typical_radii(hand_dknn), first)
    assert torch.equal(typical_radii(hand_dknn.only("height")), first[1:])
    assert searched == []
    other = DkNN.on_banks(hand_dknn.network, hand_dknn.banks, k=1)
    assert typical_radii(other)[0] < first[0]
    assert searched == [1, 1]


def test_typical_radii_agree_with_brute_force(device, monkeypatch):
    victim, _ = random_victim(device, "cosine")
    monkeypatch.setattr(guided, "_SAMPLE", 20)  # of 60: evenly spaced from the first to the last
    radii = typical_radii(victim)
    for layer, radius in zip(victim.layers, radii.tolist(), strict=True):
        rows = vectors(victim.banks[layer].features, "cosine")
        some = [int(59 * i / 19) for i in range(20)]
        fifth = [np.sort(np.linalg.norm(np.delete(rows, i, 0) - rows[i], axis=1))[4] for i in some]
        assert radius == pytest.approx(np.mean(fifth), rel=1e-5)


def test_batches_hold_as_many_images_as_their_guides_leave_room_for(hand_dknn, device, monkeypatch):
    monkeypatch.setattr(guided, "_AT_ONCE", {device.type: 4})
    monkeypatch.setattr(guided, "_BYTES", {device.type: 72})
    # Two guides of 2 + 1 float32 features: 24 bytes an image.
    assert images_at_once(hand_dknn, 2) == 3
    assert images_at_once(hand_dknn, 1) == 4
    assert images_at_once(hand_dknn, 9) == 1
    images = torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.arange(8, device=device) % 3
    sizes = []

    def attack(images, labels, guides):
        sizes.append(len(images))
        assert guides.squared_distances(images).shape == (len(labels), 2, 2)
        return images + labels.view(-1, 1, 1, 1)

    found = attack_in_batches(hand_dknn, images, labels, 2, attack)
    assert sizes == [3, 3, 2]
    assert torch.equal(found, images + labels.view(-1, 1, 1, 1))
