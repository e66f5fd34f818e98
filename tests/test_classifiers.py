"""kNN and DkNN on a bank small enough to work by hand (`hand_dknn` in conftest), and against brute force."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_advknn import evaluation
from lightning_advknn.attacks import fgsm, minimum_norm
from lightning_advknn.classifiers import KNN, DkNN
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import evaluate
from lightning_advknn.experiment import rechecks
from lightning_advknn.models import DkNNB, FeatureNetwork, LeNet5, Normalize, Surrogate, check_function
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
    banks = build_banks(network, loader, num_classes=3, settings=BankSettings("euclidean", "float32"))
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


# The door: fitted on images, asked about images


def digits(n=None):
    pixels, labels = load_digits(return_X_y=True)
    return (pixels[:n] / 16).reshape(-1, 1, 8, 8), labels[:n]


def encoder():
    """Without a head: what it gives is no tensor."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.near = nn.Linear(64, 12)
            self.far = nn.Linear(12, 6)

        def forward(self, images):
            near = self.near(images.flatten(1))
            return {"near": near, "far": self.far(near.relu())}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder()


@pytest.fixture(scope="module")
def fitted():
    images, labels = digits(900)
    return DkNN(encoder(), ["near", "far"], k=9, metric="euclidean", device="cpu").fit(images, labels)


def by_brute_force(victim, images, stored, labels):
    """Votes int64 ``(B, L, C)`` in float64."""
    votes = np.zeros((len(images), len(victim.layers), labels.max() + 1), dtype=int)
    with torch.no_grad():
        queries, rows = (victim.network.features(torch.tensor(each).float()) for each in (images, stored))
    for place, layer in enumerate(victim.layers):
        distances = torch.cdist(
            queries[layer].double(), rows[layer].double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        for query, order in enumerate(distances.numpy().argsort(1, kind="stable")[:, : victim.k]):
            for row in order:
                votes[query, place, labels[row]] += 1
    return votes


def test_fit_and_predict_are_brute_force(fitted):
    images, labels = digits()
    votes = by_brute_force(fitted, images[900:1000], images[:900], labels[:900]).sum(1)
    proba = fitted.predict_proba(images[900:1000])
    assert proba.dtype == torch.float32
    assert (proba * 18).round().tolist() == votes.tolist()
    assert fitted.predict(images[900:1000]).tolist() == votes.argmax(1).tolist()  # numpy: first of equals
    assert fitted.predict(images[900:1000]).dtype == torch.int64
    assert fitted.score(images[900:1000], labels[900:1000]) == (votes.argmax(1) == labels[900:1000]).mean()
    assert torch.equal(fitted(torch.tensor(images[900:1000]).float()), proba)
    assert fitted.num_classes == 10


def test_every_kind_of_argument_gives_the_same(fitted):
    images, labels = digits()
    expected, some = fitted.predict(images[900:]), slice(900, 1797)
    tensors = TensorDataset(torch.tensor(images).float(), torch.tensor(labels))
    for given in (
        images[some],
        torch.tensor(images[some]),
        list(torch.tensor(images[some])),
        images[some].tolist(),
    ):
        assert torch.equal(fitted.predict(given), expected)
    right = (expected.numpy() == labels[some]).mean()
    for data in (
        Subset(tensors, range(900, 1797)),
        DataLoader(Subset(tensors, range(900, 1797)), batch_size=100),
    ):
        assert fitted.score(data) == right
    other = DkNN(encoder(), ["near", "far"], k=9, metric="euclidean", device="cpu")
    for data in (Subset(tensors, range(900)), DataLoader(Subset(tensors, range(900)), batch_size=77)):
        assert torch.equal(other.fit(data).predict(images[some]), expected)
        assert other.banks["far"].ids.tolist() == list(range(900))


def test_nothing_of_an_earlier_fit_is_left(capsys):
    images, labels = digits(300)
    victim = KNN(nn.Flatten(), k=5, device="cpu").fit(images, labels).calibrate(images[:50], labels[:50])
    victim.fit_surrogate(epochs=1)
    victim.fit(images[:, :, ::2], 0 * labels)
    assert victim.predict(images[:3, :, ::2]).tolist() == [0, 0, 0]
    assert victim.num_classes == 1
    assert len(victim.calibration_votes) == 0
    assert capsys.readouterr().err == ""
    assert victim.surrogate().dknnb.in_features == 32
    assert "Trained a surrogate on output" in capsys.readouterr().err


def test_a_model_that_is_no_function_of_the_image_is_refused():
    class Dropping(nn.Module):
        def forward(self, images):
            return nn.functional.dropout(images.flatten(1))

    with pytest.raises(ValueError, match="draws random numbers"):
        KNN(Dropping(), k=5).fit(*digits(50))


def test_always_in_evaluation_mode():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    victim = KNN(model, k=5, device="cpu")
    assert not model.training
    model.train()
    victim.fit(*digits(50)).train()
    assert not any(module.training for module in victim.modules())


def test_a_normalisation_is_part_of_the_victim():
    images, labels = digits(400)
    plain, half = nn.Flatten(), nn.Sequential(Normalize([0.3], [0.2]), nn.Flatten())
    given = KNN(plain, k=5, device="cpu", mean=[0.3], std=[0.2]).fit(images, labels)
    assert torch.equal(
        given.predict_proba(images), KNN(half, k=5, device="cpu").fit(images, labels).predict_proba(images)
    )
    query = torch.tensor(images[:5]).float()
    dknnb = given.fit_surrogate(epochs=1).dknnb
    torch.testing.assert_close(given.surrogate()(query), dknnb(((query - 0.3) / 0.2).flatten(1)))
    again = DkNN.on_banks(given.network, given.banks, 5)
    assert (again.get_params()["mean"], again.get_params()["std"]) == (
        pytest.approx([0.3]),
        pytest.approx([0.2]),
    )


def test_neighbours_are_training_images(fitted):
    images, _ = digits()
    found = fitted.neighbours(images[900:904], 3)
    assert list(found) == ["near", "far"]
    with torch.no_grad():
        features = fitted.network.features(torch.tensor(images).float())
    for layer, (distances, rows) in found.items():
        true = torch.cdist(features[layer][900:904].double(), features[layer][:900].double())
        torch.testing.assert_close(distances, true.sort(1).values[:, :3], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(true.gather(1, rows), distances, rtol=1e-6, atol=1e-6)
    assert fitted.neighbours(images[900:904])["far"][1].shape == (4, 9)


def test_credibility_against_given_images(fitted):
    images, labels = digits()
    victim = DkNN.on_banks(fitted.network, fitted.banks, 9).calibrate(images[900:1100], labels[900:1100])
    votes = by_brute_force(fitted, images[900:1200], images[:900], labels[:900]).sum(1)
    known = votes[np.arange(200), labels[900:1100]]
    expected = [(known < own).mean() for own in votes[200:].max(1)]
    found = victim.credibility(images[1100:1200])
    assert found.tolist() == pytest.approx(expected)
    assert found.dtype == torch.float64
    assert torch.equal(victim.reference_votes(), victim.calibration_votes)


def test_credibility_without_calibration_is_against_leave_one_out_votes():
    # 160 images of class 0, 3 of class 1: every other or third one of class 0, all of class 1.
    images, labels = digits()
    chosen = np.concatenate([np.flatnonzero(labels == 0)[:160], np.flatnonzero(labels == 1)[:3]])
    images, labels = images[chosen], labels[chosen]
    victim = KNN(nn.Flatten(), k=5, device="cpu", metric="euclidean").fit(images, labels)
    rows = [j * 160 // 75 for j in range(75)] + [160, 161, 162]
    pixels = images.reshape(len(images), -1)
    expected = []
    for row in rows:
        distances = np.square(pixels - pixels[row]).sum(1)
        distances[row] = np.inf
        expected.append((labels[distances.argsort(kind="stable")[:5]] == labels[row]).sum())
    assert victim.reference_votes().squeeze(1).tolist() == expected
    assert len(victim.calibration_votes) == 0
    known = np.array(expected)
    own = victim.predict_proba(images[:40]).amax(1) * 5
    assert victim.credibility(images[:40]).tolist() == pytest.approx(
        [(known < v).mean() for v in own.round().tolist()]
    )
    with pytest.raises(ValueError, match="at least one calibration sample"):
        victim.credibility_of(victim.votes(victim.features(torch.tensor(images[:2]).float())))


def test_a_surrogate_is_trained_once_and_said_so(fitted, capsys):
    fitted._surrogates.clear()
    first = fitted.surrogate()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Trained a surrogate on far, as none was given: it agrees with the kNN on" in said
    assert fitted.surrogate() is first
    assert fitted.surrogate("far") is first
    assert fitted.only("far").surrogate() is first
    own = fitted.fit_surrogate("near", epochs=2)
    assert fitted.surrogate("near") is own
    assert fitted.only("near").surrogate() is own
    assert capsys.readouterr().err == ""
    images, _ = digits()
    shown = torch.tensor(images[900:]).float()
    agreement = (first(shown).argmax(1) == fitted.only("far").predict(shown)).double().mean()
    assert agreement > 0.7
    with pytest.raises(ValueError, match=r"`layer` to be one of \['near', 'far'\], but got 'middle'"):
        fitted.surrogate("middle")


def test_nothing_is_asked_before_fit():
    victim = DkNN(encoder(), ["near"])
    images, labels = digits(3)
    asked = (
        lambda: victim.predict(images),
        lambda: victim.predict_proba(images),
        lambda: victim(torch.tensor(images).float()),
        lambda: victim.score(images, labels),
        lambda: victim.credibility(images),
        lambda: victim.neighbours(images),
        lambda: victim.calibrate(images, labels),
        victim.fit_surrogate,
        victim.surrogate,
        lambda: minimum_norm(victim, torch.tensor(images).float(), torch.tensor(labels)),
        lambda: evaluate(victim, images, labels),
    )
    for ask in asked:
        with pytest.raises(NotFittedError, match=r"Call `fit\(images, labels\)` first"):
            ask()
    assert issubclass(NotFittedError, ValueError)
    assert (victim.banks, victim.num_classes) == ({}, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["nowhere"]}, "Expected distinct `layers` of the network, but got"),
        ({"k": 2.5}, "Expected `k` to be a whole number"),
        ({"metric": "manhattan"}, "Expected `metric` to be one of"),
        ({"convention": "loose"}, "Expected `convention` to be one of"),
        ({"mean": [0.5]}, "Expected `mean` and `std` together"),
    ],
)
def test_arguments_of_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        DkNN(encoder(), **{"layers": ["near"], **arguments})


@pytest.mark.parametrize(
    ("images", "labels", "arguments", "message"),
    [
        (
            digits(20)[0] * 16,
            digits(20)[1],
            {},
            r"in \[0, 1\], but got values in \[0.0, 16.0\]. Divide bytes by 255",
        ),
        (digits(20)[0] - 1e-3, digits(20)[1], {}, r"clip rounding with `.clamp\(0, 1\)`"),
        ((digits(20)[0] * 255).astype(np.uint8), digits(20)[1], {}, "Divide uint8 by 255"),
        (digits(20)[0] * np.nan, digits(20)[1], {}, "finite images"),
        (digits(20)[0], digits(20)[1] / 2, {}, "whole numbers"),
        (*digits(4), {}, r"`k` to be in \[1, 4\]"),
        (
            *digits(20),
            {"device": "abacus"},
            "Expected `device` to be one that torch can use here, with float64, but",
        ),
        (
            np.zeros((0, 1, 8, 8)),
            np.zeros(0, dtype=int),
            {},
            "Expected training images for the bank, but got none",
        ),
    ],
)
def test_what_cannot_be_fitted(images, labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        DkNN(encoder(), ["near"], k=5, **arguments).fit(images, labels)


def test_images_of_another_shape_are_refused(fitted):
    with pytest.raises(
        ValueError, match=r"Expected images of shape \(B, 1, 8, 8\), as in the bank, but got \(3, 64\)"
    ):
        fitted.predict(np.zeros((3, 64)))


def test_float64_images_count_as_they_are_stored(fitted):
    images = torch.tensor(digits()[0][900:950])
    assert images.dtype == torch.float64
    assert torch.equal(fitted(images), fitted(images.float()))


def test_images_asked_about_are_counted(fitted):
    before = fitted.queries
    fitted.predict(digits()[0][:1203])
    fitted.neighbours(digits()[0][:2])
    assert fitted.queries == before + 1205


class Telling(nn.Conv2d):
    """A convolution that notes in which precision GPUs convolve, and whether reproducibly, when it runs."""

    def __init__(self):
        super().__init__(1, 2, 3)
        self.seen = set()

    def forward(self, images):
        cudnn = torch.backends.cudnn
        exact = cudnn.conv.fp32_precision in ("none", "ieee")
        self.seen.add((exact, cudnn.deterministic, cudnn.benchmark))
        return super().forward(images)


def test_whoever_decides_convolves_in_ieee_float32_and_reproducibly(device):
    # By default torch has GPUs convolve in TF32, and cuDNN choose among all algorithms.
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    network = nn.Sequential(Telling(), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    images, labels = torch.rand(12, 1, 8, 8, device=device), torch.arange(12, device=device) % 3
    victim = DkNN(network, ["1", "3"], k=3, device=str(device))
    deciding = {
        "fit": lambda: victim.fit(images, labels),
        "calibrate": lambda: victim.calibrate(images, labels),
        "votes": lambda: victim(images),
        "features": lambda: victim.features(images),
        "predict": lambda: victim.predict(images),
        "score": lambda: victim.score(images, labels),
        "credibility": lambda: victim.credibility(images),
        "neighbours": lambda: victim.neighbours(images),
        "check": lambda: check_function(victim.network, images[:4]),
        "observe": lambda: evaluation.observe(victim, images),
        "evaluate": lambda: evaluate(victim, images, labels, images),
        "predict logits": lambda: evaluation.predict(victim.network, images),
        "attack": lambda: minimum_norm(
            victim, images, labels, surrogate=victim.network, neighbours=5, steps=1, surrogate_steps=1
        ),
        "perturb": lambda: evaluation.perturb(
            partial(fgsm, eps=0.1), Surrogate(network, "1", DkNNB(72, 3)).to(device), images, labels
        ),
        "again": lambda: rechecks.changed_in_batches(
            victim, images, labels.cpu(), torch.zeros(12, 2, 3, dtype=torch.int64)
        ),
        "gradients": lambda: rechecks.gradients(victim.network, images, labels),
        "pictures": lambda: rechecks.neighbours(victim, images),
    }
    for name, decide in deciding.items():
        network[0].seen.clear()
        decide()
        assert network[0].seen == {(True, True, False)}, name
    network[0].seen.clear()
    network(images)
    assert network[0].seen == {(False, False, False)}, "outside all is as the caller has set it"
