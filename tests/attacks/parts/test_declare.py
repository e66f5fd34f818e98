"""What attacks declare: on what they are, and what becomes of their arguments."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import lightning_advknn as advknn
from lightning_advknn import attacks
from lightning_advknn.attacks.parts.declare import declared, on_votes

ON_LOGITS = {"bim", "fgsm"}


def test_every_attack_of_the_package_is_declared():
    functions = {name: getattr(attacks, name) for name in attacks.__all__ if name.islower()}
    assert {name for name, function in functions.items() if declared(function).on == "logits"} == ON_LOGITS
    assert all(declared(function) for function in functions.values())
    assert all(getattr(advknn, name) is function for name, function in functions.items())
    assert declared(attacks.AttackSettings) is None


def points(device, *chosen):
    return torch.tensor(chosen, device=device)[:, None, None].float()


@advknn.attack(on="logits", norm="linf")
def lowest(logits_fn, images, labels, *, eps):
    """Towards where the label has least of a softmax, of a few images."""
    tries = torch.stack([images, (images + eps).clamp(max=1), (images - eps).clamp(min=0)])
    own = torch.stack([logits_fn(each).softmax(1).gather(1, labels[:, None])[:, 0] for each in tries])
    return tries[own.argmin(0), torch.arange(len(images))]


def test_an_attack_on_logits_takes_the_surrogate_of_a_victim(hand_dknn, device, capsys):
    images, labels = points(device, (0, 0.1), (1, 0.9)), torch.tensor([0, 2], device=device)
    found = advknn.bim(hand_dknn, images, labels, eps=0.4, step_size=0.1, steps=5)
    assert capsys.readouterr().err.startswith("Trained a surrogate on height, as none was given")
    surrogate = hand_dknn.surrogate()
    assert torch.equal(found, advknn.bim(surrogate, images, labels, eps=0.4, step_size=0.1, steps=5))
    assert (found != images).any()
    assert torch.equal(lowest(hand_dknn, images, labels, eps=0.3), lowest(surrogate, images, labels, eps=0.3))
    assert capsys.readouterr().err == ""


def test_an_attack_that_goes_through_a_surrogate_trains_it_where_none_is_given(hand_dknn, device, capsys):
    images, labels = points(device, (0, 0.1), (1, 0.9)), torch.tensor([0, 2], device=device)
    settings = {"neighbours": 5, "steps": 5, "surrogate_steps": 5}
    for attack, more in ((advknn.minimum_norm, {}), (advknn.credible, {"eps": 0.5})):
        given = attack(hand_dknn, images, labels, surrogate=hand_dknn.surrogate(), **settings, **more)
        hand_dknn._surrogates.clear()
        capsys.readouterr()
        assert torch.equal(attack(hand_dknn, images, labels, **settings, **more), given)
        assert capsys.readouterr().err.count("Trained a surrogate") == 1


def test_victims_are_asked_for_by_name(hand_dknn, device):
    images, labels = points(device, (0, 0.1)), torch.tensor([0], device=device)
    network = hand_dknn.network
    for target, kind in (
        (network, "lightning_advknn.models.features.FeatureNetwork"),
        (len, "builtin_function"),
    ):
        with pytest.raises(
            ValueError, match=f"minimum_norm to get a victim, a `DkNN` or `KNN`, but got a {kind}"
        ):
            advknn.minimum_norm(target, images, labels)
    with pytest.raises(
        ValueError, match="lowest to get a module that gives logits, or a victim, but got a str"
    ):
        lowest("resnet18", images, labels, eps=0.1)


@pytest.mark.parametrize("attack", ["bim", "minimum_norm"])
def test_images_and_labels_are_tensors(hand_dknn, attack):
    images, labels = np.zeros((2, 1, 1, 2), dtype=np.float32), [0, 2]
    settings = {"eps": 0.1, "step_size": 0.1, "steps": 1} if attack == "bim" else {}
    with pytest.raises(
        ValueError, match=r"Expected images as a float32 tensor .* got a numpy.ndarray.*as_tensor"
    ):
        getattr(advknn, attack)(hand_dknn, images, labels, **settings)
    with pytest.raises(ValueError, match=r"Expected int64 `labels` .* got a list.*as_tensor"):
        getattr(advknn, attack)(hand_dknn, torch.tensor(images), labels, **settings)


def test_a_declared_function_stays_what_it_was():
    assert lowest.__name__ == "lowest"
    assert lowest.__doc__.startswith("Towards where")
    assert declared(lowest) == ("logits", "linf", False)
    assert advknn.AttackSettings(f"{__name__}.lowest", {"eps": 0.1}).measure == "linf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on": "images"}, "Expected `on` to be one of ('logits', 'victim'), but got 'images'."),
        ({"on": "victim", "norm": "l1"}, "Expected `norm` to be one of ('l2', 'linf'), but got 'l1'."),
    ],
)
def test_what_cannot_be_declared(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        advknn.attack(**arguments)


def test_votes_as_logits_are_those_of_the_victim_itself(hand_dknn, device, capsys):
    # By votes (see test_classifiers.py): (.5, .5) has 3 of 6 of class 0; at (.9, .9) or (.1, .1) others.
    images, labels = points(device, (0.5, 0.5)), torch.tensor([0], device=device)
    seen = []

    @advknn.attack(on="logits")
    def look(logits_fn, images, labels):
        seen.append(logits_fn(images))
        return images

    on_votes(look)(hand_dknn, images, labels)
    assert seen[0].tolist() == [pytest.approx([3 / 6, 2 / 6, 1 / 6])]
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).to(device)
    on_votes(look)(network, images, labels)
    assert torch.equal(seen[1], network(images))
    assert capsys.readouterr().err == ""
