"""Training of DkNNB on what a bank holds, and surrogates that carry their victim's normalisation."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_advknn.models import DkNNB, JointSurrogate, Normalize, Surrogate
from lightning_advknn.models.surrogate import train_dknnb
from lightning_advknn.search import MemoryBank, StoredRows

K, CLASSES = 15, 10


@pytest.fixture(scope="module")
def bank():
    """The digits' pixels, in order of their classes, as folders of images have them."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.argsort(labels, kind="stable")
    features = torch.tensor(pixels[order] / 16, dtype=torch.float32)
    return MemoryBank(features, torch.tensor(labels[order]), torch.arange(len(features)), CLASSES)


@pytest.fixture(scope="module")
def votes(bank):
    return bank.leave_one_out_votes(K)


def test_it_imitates_the_knn_where_it_has_not_been_trained(bank, votes):
    shown = torch.rand(len(bank), generator=torch.Generator().manual_seed(0)) < 0.9
    hidden = bank.features[~shown]
    with torch.no_grad():
        logits = train_dknnb(bank.features[shown], votes[shown]).dknnb(hidden)
    classes = votes.argmax(1)
    # As often as the same kind of model by scikit-learn.
    theirs = (
        LogisticRegression(max_iter=500)
        .fit(bank.features[shown], classes[shown])
        .score(hidden, classes[~shown])
    )
    assert (logits.argmax(1) == classes[~shown]).double().mean() > theirs - 0.04
    assert theirs > 0.9
    # L_CL makes it give the votes' shares, not only the winner.
    shares = votes[~shown].double() / K
    assert (logits.softmax(1) - shares).abs().mean() < 0.03 < (0.1 - shares).abs().mean() / 5


def test_what_it_says_of_itself(bank, votes):
    trained = train_dknnb(bank.features, votes)
    with torch.no_grad():
        agreement = (trained.dknnb(bank.features).argmax(1) == votes.argmax(1)).double().mean().item()
    assert trained.agreement == pytest.approx(agreement, abs=0.07)  # of a tenth of the rows, not trained on


def test_the_weights_of_the_losses_count(bank, votes):
    # Without L_CL it learns the winner alone, and so is surer of it than the votes are.
    both, winner = (train_dknnb(bank.features, votes, cl_weight=weight).dknnb for weight in (1.0, 0.0))
    split = (votes.amax(1) < 12).nonzero().squeeze(1)
    with torch.no_grad():
        sure, surer = (each(bank.features[split]).softmax(1).amax(1).mean() for each in (both, winner))
    assert surer > sure
    assert abs(sure - (votes[split].amax(1) / K).mean()) < 0.1


def test_the_best_epoch_is_kept(bank, votes):
    # Steps that are far too long: later epochs are worse than the first ones.
    kls = [train_dknnb(bank.features, votes, epochs=epochs, learning_rate=300.0).kl for epochs in range(5)]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] == pytest.approx(
        torch.log(torch.tensor(10.0)).item(), abs=0.3
    )  # all classes alike, at first


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_features_does_not_matter(bank, votes, scale):
    one, other = (
        train_dknnb(bank.features, votes, epochs=3),
        train_dknnb(scale * bank.features, votes, epochs=3),
    )
    with torch.no_grad():
        logits, scaled = one.dknnb(bank.features), other.dknnb(scale * bank.features)
    assert (logits.argmax(1) == scaled.argmax(1)).double().mean() > 0.97
    assert other.kl == pytest.approx(one.kl, rel=0.1)


def test_of_its_seed_alone_and_no_random_state_changes(bank, votes):
    state = torch.get_rng_state()
    first = train_dknnb(bank.features, votes, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    with torch.inference_mode():
        again = train_dknnb(bank.features, votes, epochs=2)
    other = train_dknnb(bank.features, votes, epochs=2, seed=1)
    assert torch.equal(first.dknnb.weight, again.dknnb.weight)
    assert not torch.equal(first.dknnb.weight, other.dknnb.weight)
    assert first.dknnb.weight.requires_grad


def test_rows_in_a_file_are_read_in_blocks(bank, votes, tmp_path, monkeypatch):
    stored = StoredRows(bank.features.shape[1], torch.float32, tmp_path, torch.device("cpu"))
    stored.append(bank.features)
    reads = []
    monkeypatch.setattr("lightning_advknn.models.surrogate._READ", 256)
    read = StoredRows.__getitem__
    monkeypatch.setattr(StoredRows, "__getitem__", lambda self, rows: reads.append(rows) or read(self, rows))
    from_file = train_dknnb(stored, votes, epochs=2)
    assert torch.equal(from_file.dknnb.weight, train_dknnb(bank.features, votes, epochs=2).dknnb.weight)
    assert max(map(len, reads)) <= 256
    assert torch.cat(reads).unique().tolist() == list(range(len(bank)))


def test_classes_come_mixed_from_rows_in_order_of_class(bank, votes, monkeypatch):
    monkeypatch.setattr("lightning_advknn.models.surrogate._READ", 256)
    assert train_dknnb(bank.features, votes).agreement > 0.9


def test_too_few_rows(votes):
    with pytest.raises(ValueError, match="at least 2 bank rows to train a surrogate on, but got 1"):
        train_dknnb(torch.ones(1, 3), votes[:1])
    assert train_dknnb(torch.ones(2, 3), votes[:2], epochs=1).dknnb.weight.isfinite().all()
    assert train_dknnb(torch.zeros(9, 3), votes[:9]).dknnb.weight.isfinite().all()


def test_surrogates_normalise_as_their_victims_do():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
        dknnb = DkNNB(3 * 4, 5)
    images, mean, std = torch.rand(6, 2, 4, 4), [0.2, 0.6], [0.3, 0.5]
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = dknnb(network(normalised))
    torch.testing.assert_close(Surrogate(network, "1", dknnb, Normalize(mean, std))(images), expected)
    joint = JointSurrogate(network, {"1": dknnb}, Normalize(mean, std))
    torch.testing.assert_close(joint(images).softmax(1), expected.softmax(1))
    assert not torch.allclose(Surrogate(network, "1", dknnb)(images), expected)


def test_what_a_checkpoint_of_a_surrogate_names():
    names = set(Surrogate(nn.Sequential(nn.Linear(2, 3)), "0", DkNNB(3, 2)).state_dict())
    assert names == {"backbone.network.0.weight", "backbone.network.0.bias", "dknnb.weight", "dknnb.bias"}
