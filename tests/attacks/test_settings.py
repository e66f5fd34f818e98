"""What configurations may say an attack is run on, before anything runs."""

import subprocess
import sys

import pytest
import torch

import lightning_advknn as advknn
from lightning_advknn.attacks import AttackSettings
from lightning_advknn.evaluation import perturb

METHODS, VICTIMS = ("origin", "dknnb"), ("knn", "dknn")
HERE = __name__
BLACK_BOX = {"function": "foolbox.attacks.BoundaryAttack", "settings": {"steps": 5}}


def undeclared(victim, images, labels):
    """Says nothing of what it is on, but the name of its first argument."""
    return (1 - images) if hasattr(victim, "banks") else images


def plain(target, images, labels):
    """Inverts images where it is given a victim."""
    return (1 - images) if hasattr(target, "banks") else images


@advknn.attack(on="victim", norm="l2")
def on_victims(target, images, labels):
    return 1 - images


@advknn.attack(on="logits", norm="linf")
def without_gradients(logits_fn, images, labels, *, eps):
    """The better of two changes by the logits of the labels."""
    tries = torch.stack([(images + eps).clamp(max=1), (images - eps).clamp(min=0)])
    own = torch.stack([logits_fn(each).gather(1, labels[:, None])[:, 0] for each in tries])
    return tries[own.argmin(0), torch.arange(len(images))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"function": "fgsm", "settings": {"eps": 0.1}}, METHODS),
        ({"function": "qp"}, VICTIMS),
        (BLACK_BOX, METHODS),
        ({"function": f"{HERE}.plain"}, METHODS),
        ({"function": f"{HERE}.on_victims"}, VICTIMS),
        ({"function": "fgsm", "targets": ["dknnb"]}, ["dknnb"]),
        ({"function": "qp", "targets": ["dknn"]}, ["dknn"]),
        ({**BLACK_BOX, "targets": ["knn", "dknn"]}, ["knn", "dknn"]),
        ({**BLACK_BOX, "targets": ["origin", "dknn"]}, ["origin", "dknn"]),
        ({"function": f"{HERE}.plain", "targets": ["dknn"]}, ["dknn"]),
        ({"function": "qp", "targets": ["origin"]}, r"among \['knn', 'dknn'\], but got 'origin'"),
        ({"function": "fgsm", "targets": ["nobody"]}, r"'dknnb', 'knn', 'dknn'\], but got 'nobody'"),
        ({"function": "minimum_norm", "through": "nobody"}, r"among \['origin', 'dknnb'\], but got 'nobody'"),
    ],
)  # fmt: skip
def test_what_it_is_run_on(settings, expected):
    settings = AttackSettings(**settings)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            settings.targets_among(METHODS)
    else:
        assert settings.targets_among(METHODS) == expected


def test_what_it_is_on_by_default():
    assert AttackSettings("minimum_norm").on_victim
    assert AttackSettings(f"{HERE}.on_victims").on_victim
    assert not AttackSettings("fgsm").on_victim
    assert not AttackSettings(f"{HERE}.plain", targets=["dknn"]).on_victim
    assert not AttackSettings(BLACK_BOX["function"], targets=["dknn"]).on_victim


@pytest.mark.parametrize("targets", [None, ["origin"], ["origin", "dknn"], []])
def test_a_function_that_calls_its_target_a_victim_has_to_say_so(targets):
    path = f"{HERE}.undeclared"
    for refused in (AttackSettings.check, AttackSettings.bind):
        with pytest.raises(
            ValueError, match=rf'{path}, whose .*@lightning_advknn.attack\(on="victim"\).*`targets: \[knn'
        ):
            refused(AttackSettings(path, targets=targets))


@pytest.mark.parametrize("name", ["undeclared", "plain"])
def test_a_function_that_is_not_declared_gets_the_victim_that_targets_name(name, hand_dknn, device):
    images = torch.tensor([[0.0, 0.1], [1.0, 0.9]], device=device)[:, None, None]
    labels = torch.tensor([0, 2], device=device)
    bound = AttackSettings(f"{HERE}.{name}", targets=["knn", "dknn"]).bind()
    assert torch.equal(perturb(bound, hand_dknn, images, labels), 1 - images)


def test_a_declared_attack_on_logits_gets_votes(hand_dknn, device, capsys):
    # By votes of DkNN (see test_classifiers.py): at (.6, .6) class 2 has 4 of 6, at (.1, .1) none.
    images, labels = torch.full((1, 1, 1, 2), 0.35, device=device), torch.tensor([2], device=device)
    bound = AttackSettings(f"{HERE}.without_gradients", {"eps": 0.25}, targets=["dknn"]).bind()
    adversarial = perturb(bound, hand_dknn, images, labels)
    torch.testing.assert_close(adversarial, torch.full_like(images, 0.1))
    assert capsys.readouterr().err == ""  # no surrogate was trained


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("bim", {"eps": 0.1, "step_size": 0.1, "steps": 1}),
        ("torchattacks.PGD", {}),
        ("art.attacks.evasion.FastGradientMethod", {"eps": 0.1}),
    ],
)
def test_gradients_of_votes_are_refused_before_anything_runs(function, settings):
    AttackSettings(function, settings, targets=["origin"]).bind()
    with pytest.raises(
        ValueError, match=rf"{function}.*It is to attack votes \(\['dknn'\] among `targets`\)"
    ):
        AttackSettings(function, settings, targets=["origin", "dknn"]).bind()


@pytest.mark.parametrize("precision", ["winograd", "bfloat16", "tf32"])
def test_precisions(precision):
    AttackSettings("fgsm", {"eps": 0.1}, precision, targets=["origin"]).check()
    with pytest.raises(
        ValueError, match=rf"`precision` 'float32' for .* with \['knn'\] .* but got '{precision}'"
    ):
        AttackSettings(**BLACK_BOX, precision=precision, targets=["knn"]).check()
    victims = AttackSettings("minimum_norm", precision=precision)
    if precision in ("bfloat16", "tf32"):
        with pytest.raises(ValueError, match="a victim decides in float32"):
            victims.check()
    else:
        victims.check()  # it differentiates the victim's network


def test_settings_import_nothing_heavy():
    code = (
        "import sys; from jsonargparse import ArgumentParser\n"
        "from lightning_advknn.attacks.settings import AttackSettings\n"
        "parser = ArgumentParser(); parser.add_class_arguments(AttackSettings, 'attack')\n"
        "parser.parse_args(['--attack.function=fgsm', '--attack.targets=[dknn]'])\n"
        "print([name for name in ('torch', 'numpy', 'pytorch_lightning', 'sklearn') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
