"""FGSM and BIM against torchattacks, foolbox, and a linear model whose adversarials are known."""

import math
import warnings

import pytest
import torch
import torchattacks
from torch import nn

from lightning_advknn.attacks import bim, fgsm
from lightning_advknn.attacks.gradient_sign import loss_and_gradient

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports a name that scipy moved
    import foolbox


def convnet(device, dtype=torch.float64):
    """A small random network; float64, so that no sign of a gradient hangs on rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2),
            nn.Tanh(),
            nn.Conv2d(6, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 5),
        )
    return network.to(device, dtype).eval()


def batch(device, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 2, 11, 11, generator=generator, dtype=dtype)
    images[:, 0, :3], images[:, 1, -3:] = 0, 1  # pixels that clipping to [0, 1] touches
    return images.to(device), torch.randint(5, (size,), generator=generator).to(device)


class Linear(nn.Module):
    """Two classes with margin f(x) = w.x + b: class 0 where it is positive."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def margin(self, images):
        return images.flatten(1) @ self.weight + self.bias

    def forward(self, images):
        return torch.stack([self.margin(images), -self.margin(images)], 1)


ATTACKS = {
    "fgsm": lambda f, x, y: fgsm(f, x, y, eps=0.1),
    "bim": lambda f, x, y: bim(f, x, y, eps=0.1, step_size=0.03, steps=5),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
def test_fgsm_agrees_with_torchattacks_and_foolbox(device, eps):
    network, (images, labels) = convnet(device), batch(device)
    adversarial = fgsm(network, images, labels, eps=eps)
    assert (adversarial - images).abs().amax().item() == pytest.approx(eps)
    theirs = torchattacks.FGSM(network, eps=eps)(images, labels)
    torch.testing.assert_close(adversarial, theirs, rtol=0, atol=1e-5)
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    theirs, _, _ = attack(
        foolbox.PyTorchModel(network, bounds=(0, 1), device=device), images, labels, epsilons=eps
    )
    torch.testing.assert_close(adversarial, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("eps", "step_size", "steps"), [(0.1, 0.02, 1), (0.1, 0.03, 10), (0.25, 0.01, 20), (0.05, 0.2, 3)]
)
def test_bim_agrees_with_torchattacks_and_foolbox(device, eps, step_size, steps):
    network, (images, labels) = convnet(device), batch(device)
    adversarial = bim(network, images, labels, eps=eps, step_size=step_size, steps=steps)
    assert (adversarial - images).abs().amax().item() == pytest.approx(min(eps, steps * step_size))
    theirs = torchattacks.BIM(network, eps=eps, alpha=step_size, steps=steps)(images, labels)
    torch.testing.assert_close(adversarial, theirs, rtol=0, atol=1e-5)
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=step_size, steps=steps, random_start=False)
    theirs, _, _ = attack(
        foolbox.PyTorchModel(network, bounds=(0, 1), device=device), images, labels, epsilons=eps
    )
    torch.testing.assert_close(adversarial, theirs, rtol=0, atol=1e-5)


def test_loss_and_gradient_of_a_linear_model_are_known(device):
    weight = torch.tensor([1.0, -2, 0, 0.5], dtype=torch.float64)
    model = Linear(weight, 0.25).to(device)
    images = torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(
        device
    )
    labels = torch.tensor([0, 1, 0, 1, 0, 0], device=device)
    loss, gradient = loss_and_gradient(model, images, labels)
    expected = 0.0
    for row in range(6):
        # d/dx log(1 + exp(-+2 f)): the wrong class's probability times -+2 w
        sign = 1 if labels[row] == 0 else -1
        wrong = 1 / (1 + math.exp(sign * 2 * model.margin(images[row : row + 1]).item()))
        torch.testing.assert_close(gradient[row].flatten().cpu(), -sign * 2 * wrong * weight)
        expected -= math.log(1 - wrong)
    assert loss.item() == pytest.approx(expected)
    assert not loss.requires_grad


def test_attacks_on_a_linear_model_are_known(device):
    # Pixels at .5, so that nothing but eps binds; a weight of zero leaves its pixel alone.
    weight = torch.tensor([1.0, -2, 0, 0.5])
    model = Linear(weight, 0.3).to(device)
    images = torch.full((2, 1, 2, 2), 0.5, device=device)
    labels = torch.tensor([0, 1], device=device)
    direction = torch.tensor([[-1.0, 1, 0, -1], [1, -1, 0, 1]]).view(2, 1, 2, 2).to(device)
    torch.testing.assert_close(fgsm(model, images, labels, eps=0.1), images + 0.1 * direction)
    torch.testing.assert_close(
        bim(model, images, labels, eps=0.1, step_size=0.03, steps=2), images + 0.06 * direction
    )
    torch.testing.assert_close(
        bim(model, images, labels, eps=0.1, step_size=0.03, steps=9), images + 0.1 * direction
    )


@pytest.mark.parametrize("name", ["fgsm", "bim"])
def test_a_linear_model_falls_exactly_where_it_must(device, name):
    # The smallest Linf perturbation that crosses f = 0 is |f(x)| / |w|_1.
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(9, generator=generator, dtype=torch.float64)
    model = Linear(weight, 0.1).to(device)
    images = 0.5 + 0.02 * torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64).to(device)
    margin = model.margin(images).item()
    label = torch.tensor([int(margin < 0)], device=device)
    smallest = abs(margin) / weight.abs().sum().item()
    assert smallest < 0.3
    for factor, fooled in ((0.999, False), (1.001, True)):
        eps = factor * smallest
        if name == "fgsm":
            adversarial = fgsm(model, images, label, eps=eps)
        else:
            adversarial = bim(model, images, label, eps=eps, step_size=eps / 3, steps=5)
        assert (model(adversarial).argmax(1) != label).item() is fooled


def test_pixels_stay_in_the_unit_interval_by_hand(device):
    model = Linear(torch.tensor([1.0, 1, -1, -1]), 0.0).to(device)
    images = torch.tensor([0.05, 0.5, 0.5, 0.95], device=device).view(1, 1, 2, 2)
    label = torch.tensor([0], device=device)
    expected = torch.tensor([0.0, 0.4, 0.6, 1.0], device=device).view(1, 1, 2, 2)
    torch.testing.assert_close(fgsm(model, images, label, eps=0.1), expected)
    torch.testing.assert_close(bim(model, images, label, eps=0.1, step_size=0.04, steps=4), expected)


def test_eq_3_projects_the_perturbation_and_not_the_step(device):
    # f rises, then falls: a step of .1 from .5 overshoots the peak of the loss at .55, and the next one
    # returns.
    def logits_fn(images):
        height = -((images.flatten(1) - 0.55) ** 2)
        return torch.cat([-height, torch.zeros_like(height)], 1)

    images, labels = torch.full((1, 1), 0.5, device=device), torch.tensor([0], device=device)
    found = [bim(logits_fn, images, labels, eps=0.08, step_size=0.1, steps=n).item() for n in (1, 2, 3)]
    # .5 -> .6, cut to .58 -> .48 -> .58
    assert found == pytest.approx([0.58, 0.48, 0.58])


@pytest.mark.parametrize("seed", range(12))
def test_adversarials_stay_in_the_ball_and_the_unit_interval(device, seed):
    network, (images, labels) = convnet(device, torch.float32), batch(device, dtype=torch.float32)
    eps, step_size = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    eps, steps = eps**2, 1 + seed % 5
    for adversarial in (
        fgsm(network, images, labels, eps=eps),
        bim(network, images, labels, eps=eps, step_size=step_size, steps=steps),
    ):
        assert adversarial.shape == images.shape
        assert adversarial.dtype == images.dtype
        assert 0 <= adversarial.min() <= adversarial.max() <= 1
        assert (adversarial.double() - images.double()).abs().max() <= eps + 2.0**-24
        assert not torch.equal(adversarial, images)


def test_no_eps_or_no_steps_is_the_identity(device):
    network, (images, labels) = convnet(device), batch(device)
    before = images.clone()
    for adversarial in (
        fgsm(network, images, labels, eps=0),
        bim(network, images, labels, eps=0, step_size=0.1, steps=3),
        bim(network, images, labels, eps=0.1, step_size=0.1, steps=0),
        bim(network, images, labels, eps=0.1, step_size=0, steps=3),
    ):
        assert torch.equal(adversarial, images)
        adversarial.zero_()  # a copy: the images themselves stay
        assert torch.equal(images, before)


@each_attack
def test_an_image_does_not_depend_on_its_batch(device, attack):
    network, (images, labels) = convnet(device), batch(device, size=9)
    together = attack(network, images, labels)
    apart = [attack(network, images[i : i + 1], labels[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-12)
    pairs = [attack(network, x, y) for x, y in zip(images.split(4), labels.split(4), strict=True)]
    torch.testing.assert_close(together, torch.cat(pairs), rtol=0, atol=1e-12)


@each_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(device, attack, mode):
    network, (images, labels) = convnet(device), batch(device)
    expected = attack(network, images, labels)
    with mode():
        # Tensors made here are inference tensors, which autograd refuses.
        found = attack(network, images + 0, labels + 0)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_attack
def test_leaves_nothing_behind(device, attack):
    network, (images, labels) = convnet(device), batch(device)
    kept_images, kept_labels = images.clone(), labels.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    adversarial = attack(network, images, labels)
    assert not adversarial.requires_grad
    assert not images.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@each_attack
def test_no_images(device, attack):
    network, (images, labels) = convnet(device), batch(device)
    assert attack(network, images[:0], labels[:0]).shape == (0, 2, 11, 11)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eps", {"eps": -0.1, "step_size": 0.1, "steps": 1}),
        ("eps", {"eps": math.nan, "step_size": 0.1, "steps": 1}),
        ("eps", {"eps": math.inf, "step_size": 0.1, "steps": 1}),
        ("step_size", {"eps": 0.1, "step_size": -1, "steps": 1}),
        ("steps", {"eps": 0.1, "step_size": 0.1, "steps": -1}),
    ],
)
def test_settings_out_of_range(name, settings):
    images, labels = batch("cpu")
    value = settings[name]
    with pytest.raises(ValueError, match=f"Expected `{name}` to be finite and at least 0, but got {value}"):
        bim(convnet("cpu"), images, labels, **settings)
    if name == "eps":
        with pytest.raises(ValueError, match=f"Expected `eps` to be finite and at least 0, but got {value}"):
            fgsm(convnet("cpu"), images, labels, eps=value)


@each_attack
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.01, 1.01])
def test_images_out_of_range(device, attack, value):
    images, labels = batch(device)
    images[3, 1, 4, 4] = value
    with pytest.raises(ValueError, match=r"Expected finite images in \[0, 1\], but got values in \["):
        attack(convnet(device), images, labels)


@each_attack
def test_images_of_bytes(attack):
    images, labels = batch("cpu")
    with pytest.raises(ValueError, match=r"floating-point images.*torch.uint8. Divide uint8 by 255"):
        attack(convnet("cpu"), (images * 255).byte(), labels)


@each_attack
@pytest.mark.parametrize(
    "wrong", [lambda y: y[:-1], lambda y: y[:, None], lambda y: y.int(), lambda y: y.double()], ids=range(4)
)
def test_labels_of_another_shape_or_type(attack, wrong):
    images, labels = batch("cpu")
    with pytest.raises(
        ValueError, match=r"Expected int64 `labels` of shape \(8,\), one for each image, but got"
    ):
        attack(convnet("cpu"), images, wrong(labels))


@each_attack
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(device, attack, value):
    network, (images, labels) = convnet(device), batch(device)
    with torch.no_grad():
        network[0].weight.fill_(value)
    with pytest.raises(ValueError, match=r"Expected a finite attack loss, but got nan.*network's weights"):
        attack(network, images, labels)


def test_a_loss_that_is_not_finite_once(device):
    # It is looked at after the last step, and must not be forgotten by then.
    calls = []

    def logits_fn(images):
        calls.append(1)
        return images.flatten(1) * (math.nan if len(calls) == 2 else 1)

    images, labels = batch(device)
    with pytest.raises(ValueError, match="Expected a finite attack loss, but got nan"):
        bim(logits_fn, images, labels, eps=0.1, step_size=0.03, steps=5)
