"""kNN and DkNN on a network and bank small enough to work by hand (`hand_dknn` in conftest), and brute force."""

from collections import Counter

import numpy as np
import pytest
import torch

from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.models import FeatureNetwork, LeNet5
from lightning_advknn.search.build import BankSettings, build_banks

# Squared distances from each query to the bank's rows 0 to 5 (see `hand_dknn`); k = 3:
#
# query     layer both                       nearest     votes       layer height: (y - y_i)^2        nearest
# (0, .1)   .01 .02 .85 1.01 1.62 1.81       0 1 2       (2, 1, 0)   .01 .01 .81 .01 .81 .81          0 1 3
# (1, .9)   1.81 1.62 .65 .81 .02 .01        5 4 2       (0, 1, 2)   .81 .81 .01 .81 .01 .01          2 4 5
# (.5, .5)  .5 .41 .34 .5 .41 .5             2 1 4       (1, 1, 1)   .25 six times                    0 1 2
# (.6, .6)  .72 .61 .32 .52 .25 .32          4 2 5       (0, 1, 2)   .36 .36 .16 .36 .16 .16          2 4 5
POINTS = [(0, 0.1), (1, 0.9), (0.5, 0.5), (0.6, 0.6)]
VOTES = [
    [[2, 1, 0], [2, 1, 0]],
    [[0, 1, 2], [0, 1, 2]],
    [[1, 1, 1], [2, 1, 0]],
    [[0, 1, 2], [0, 1, 2]],
]


def points(device, *chosen):
    return torch.tensor(chosen or POINTS, device=device)[:, None, None].float()


def test_dknn_by_hand(hand_dknn, device):
    assert hand_dknn.votes(hand_dknn.network.features(points(device))).tolist() == VOTES
    assert hand_dknn.predict(points(device)).tolist() == [0, 2, 0, 2]
    assert hand_dknn.layers == ("both", "height")


@pytest.mark.parametrize(("layer", "predictions"), [("both", [0, 2, 0, 2]), ("height", [0, 2, 0, 2])])
def test_knn_by_hand(hand_dknn, device, layer, predictions):
    knn = hand_dknn.only(layer)
    votes = knn.votes(knn.network.features(points(device)))
    assert votes.tolist() == [[sample[hand_dknn.layers.index(layer)]] for sample in VOTES]
    assert knn.predict(points(device)).tolist() == predictions
    assert knn(points(device)).tolist() == [
        pytest.approx([count / 3 for count in sample[hand_dknn.layers.index(layer)]]) for sample in VOTES
    ]


def test_one_neighbour_by_hand(hand_dknn, device):
    knn = DkNN.on_banks(FeatureNetwork(hand_dknn.network.network, ["both"]), hand_dknn.banks, k=1)
    assert knn.predict(points(device)).tolist() == [0, 2, 1, 2]  # rows 0, 5, 2, 4


def test_calibration_by_hand(hand_dknn, device):
    # True-class votes for labels 0, 1 and 1: (2, 2), (1, 1) and (1, 1), summed 4, 2, 2.
    # (.6, .6): predicted 2 with v = 4: two of three are below, all at most 4; trimmed (kL = 6): none is.
    # (.5, .5): predicted 0 with v = 3: two of three either way.
    calibration = points("cpu", *POINTS[:3])
    loader = [
        Batch(calibration[:2], torch.tensor([0, 1]), torch.arange(2)),
        Batch(calibration[2:], torch.tensor([1]), torch.tensor([2])),
    ]
    hand_dknn.calibrate(loader)
    assert hand_dknn.calibration_votes.tolist() == [[2, 2], [1, 1], [1, 1]]
    votes = hand_dknn.votes(hand_dknn.network.features(points(device, *POINTS[2:])))
    for convention, expected in (("strict", [2 / 3, 2 / 3]), ("ge", [2 / 3, 1]), ("trim_zeros", [2 / 3, 1])):
        hand_dknn.convention = convention
        assert hand_dknn.credibility_of(votes).tolist() == pytest.approx(expected, abs=1e-15)
    hand_dknn.calibrate(loader[:1])
    assert hand_dknn.calibration_votes.tolist() == [[2, 2], [1, 1]], "calibrating again starts afresh"


def test_credibility_needs_calibration(hand_dknn, device):
    with pytest.raises(ValueError, match="at least one calibration sample"):
        hand_dknn.credibility_of(hand_dknn.votes(hand_dknn.network.features(points(device))))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_dknn_agrees_with_brute_force(device, metric):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LeNet5()
    network = FeatureNetwork(network, ["relu1", "relu4", "logits"]).eval().to(device)
    images, queries = (torch.rand(n, 1, 28, 28, generator=generator) for n in (90, 25))
    labels = torch.randint(4, (90,), generator=generator)
    banks = build_banks(network, [Batch(images, labels, torch.arange(90))], 4, BankSettings(metric))
    dknn = DkNN.on_banks(network, banks, k=9)
    with torch.no_grad():
        features = network.features(queries.to(device))
        stored = network.features(images.to(device))
    votes = np.zeros((25, 3, 4), dtype=int)
    for position, layer in enumerate(network.layers):
        q, x = features[layer].double().cpu().numpy(), stored[layer].double().cpu().numpy()
        for query in range(25):
            if metric == "cosine":
                distances = 1 - x @ q[query] / (np.linalg.norm(x, axis=1) * np.linalg.norm(q[query]))
            else:
                distances = np.linalg.norm(x - q[query], axis=1)
            for label, count in Counter(labels[distances.argsort()[:9]].tolist()).items():
                votes[query, position, label] = count
    with torch.no_grad():
        assert dknn.votes(features).tolist() == votes.tolist()
        assert (
            dknn.predict(queries.to(device)).tolist() == votes.sum(1).argmax(1).tolist()
        )  # numpy: first of equals
    assert len(set(votes.sum(1).argmax(1))) > 1


def test_banks_hold_every_image_with_its_label_and_id(device):
    network = FeatureNetwork(LeNet5(), ["relu3", "logits"]).eval().to(device)
    images = torch.rand(11, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    labels, ids = torch.arange(11) % 3, torch.arange(100, 111)
    loader = [Batch(images[i : i + 4], labels[i : i + 4], ids[i : i + 4]) for i in (0, 4, 8)]
    banks = build_banks(network, loader, 3, BankSettings("euclidean", "float32"))
    assert list(banks) == ["relu3", "logits"]
    with torch.no_grad():
        expected = network.features(images.to(device))
    for layer, bank in banks.items():
        torch.testing.assert_close(bank.features, expected[layer])
        assert bank.features.device.type == device.type
        assert not bank.features.requires_grad
        assert bank.labels.tolist() == labels.tolist()
        assert bank.ids.tolist() == ids.tolist()
        assert (bank.num_classes, bank.metric, bank.backend) == (3, "euclidean", "float32")


def test_unknown_layer_lists_the_known_ones(hand_dknn):
    with pytest.raises(ValueError, match=r"`layer` to be one of \['both', 'height'\], but got 'relu3'"):
        hand_dknn.only("relu3")


@pytest.mark.parametrize("k", [0, 7])
def test_k_beyond_the_bank(hand_dknn, k):
    banks = hand_dknn.banks
    with pytest.raises(ValueError, match=rf"Expected `k` to be in \[1, 6\] .* but got {k}"):
        DkNN.on_banks(hand_dknn.network, banks, k=k)


def test_a_layer_without_a_bank(hand_dknn):
    with pytest.raises(ValueError, match=r"a bank for each layer, but \['height'\] have none"):
        DkNN.on_banks(hand_dknn.network, {"both": hand_dknn.banks["both"]}, k=3)


def test_k_defaults_to_the_papers(hand_dknn):
    with pytest.raises(ValueError, match="but got 75"):
        DkNN.on_banks(hand_dknn.network, hand_dknn.banks)
