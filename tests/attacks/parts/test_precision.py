"""What attacks differentiate: as exact as its precision says, and left as it was found."""

import pytest
import torch
import torch.nn.functional as F
import torchattacks
import torchvision
from torch import nn

from lightning_advknn.attacks import AttackSettings, bim
from lightning_advknn.attacks.gradient_sign import loss_and_gradient
from lightning_advknn.attacks.parts import precision as precisions
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.classifiers import DkNN
from lightning_advknn.convolutions import CookToomConvolution
from lightning_advknn.evaluation import perturb
from lightning_advknn.models import ConvNet, DkNNB, FeatureNetwork, Surrogate
from lightning_advknn.search import MemoryBank

PRECISIONS = ("float32", "winograd", "bfloat16", "tf32")
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


class Noisy(nn.Module):
    """A network whose output shows its mode: dropout and batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 2, 1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Dropout(0.5)
        )
        self.modes = []

    def forward(self, images):
        self.modes.append((self.training, any(p.requires_grad for p in self.parameters())))
        return self.layers(images)


def convnet(device):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvNet(mean=(0.13,), std=(0.31,)).to(device).eval()


def batch(device, size=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


@each_precision
def test_a_network_is_frozen_and_left_as_it_was(device, precision):
    network = Noisy().to(device).train()
    network.layers[2].eval()
    network.layers[3].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = torch.rand(6, 1, 2, 2, device=device), torch.zeros(6, dtype=torch.int64, device=device)
    with prepared(network, precision) as logits_fn:
        adversarial = bim(logits_fn, images, labels, eps=0.1, step_size=0.05, steps=2)
        assert network.layers[0].weight.dtype == torch.float32
    assert (adversarial - images).abs().max() > 0.05
    assert adversarial.dtype == torch.float32
    assert network.modes == [(False, False)] * 2
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.layers] == [True, True, False, True, True]
    assert network.training
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {"layers.3.bias"}
    assert all(p.grad is None for p in network.parameters())
    assert "forward" not in vars(network.layers[0])


def test_a_network_is_restored_after_an_error():
    network = Noisy().train()
    network.layers[4].eval()

    def fail():
        with prepared(network, "winograd"):
            assert not any(module.training for module in network.modules())
            assert not any(parameter.requires_grad for parameter in network.parameters())
            assert "forward" in vars(network.layers[0])
            raise RuntimeError("attack failed")

    with pytest.raises(RuntimeError, match="attack failed"):
        fail()
    assert [module.training for module in network.layers] == [True, True, True, True, False]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert "forward" not in vars(network.layers[0])


def test_without_gradients_winograd_is_the_network_itself(device):
    if device.type != "cpu":
        pytest.skip("winograd is for CPUs")
    images, _ = batch(device)
    network = convnet(device)
    with torch.no_grad():
        logits = network(images)
    with prepared(network, "winograd") as logits_fn:
        with torch.no_grad():
            assert torch.equal(logits_fn(images), logits)
        assert not torch.equal(logits_fn(images), logits)


def test_a_victim_says_of_an_image_what_it_says_without_an_attack(device):
    network = FeatureNetwork(convnet(device), ["relu1", "logits"])
    images, _ = batch(device)
    bank = MemoryBank(
        network.features(images)["relu1"].detach(),
        torch.arange(len(images), device=device) % 10,
        torch.arange(len(images), device=device),
        10,
    )
    seen = []
    victim = DkNN.on_banks(FeatureNetwork(network.network, ["relu1"]), {"relu1": bank}, k=1)
    network.network.relu1.register_forward_hook(lambda *args: seen.append(args[-1].detach().clone()))
    victim.predict(images)
    with prepared(victim, "winograd") as ready:
        ready(images)
    assert torch.equal(*seen)


@each_precision
def test_functions_are_not_touched(device, precision):
    images, weight = torch.rand(4, 3, device=device), torch.eye(3, device=device)
    with prepared(lambda images: images @ weight, precision) as logits_fn:
        logits = logits_fn(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, images, rtol=0, atol=0 if precision != "bfloat16" else 0.01)


@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 1e-6), ("winograd", 1e-4), ("bfloat16", 0.1), ("tf32", 1e-2)]
)
def test_gradients_are_as_exact_as_stated(device, precision, error):
    network, (images, labels) = convnet(device), batch(device)
    _, exact = loss_and_gradient(convnet(device).double(), images.double(), labels)
    with prepared(network, precision) as logits_fn:
        loss, gradient = loss_and_gradient(logits_fn, images, labels)
    assert gradient.dtype == loss.dtype == torch.float32
    errors = (gradient - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert errors.median() < error  # of one image more, where a ReLU is near zero


def test_float32_is_torchattacks_and_winograd_is_as_strong(device):
    network, (images, labels) = convnet(device), batch(device, 32)
    theirs = torchattacks.BIM(network, eps=0.1, alpha=0.01, steps=20)(images, labels)
    with torch.no_grad():
        their_loss = F.cross_entropy(network(theirs), labels)
    for precision, share in (("float32", 0.999), ("winograd", 0.7)):
        with prepared(network, precision) as logits_fn:
            ours = bim(logits_fn, images, labels, eps=0.1, step_size=0.01, steps=20)
        # A gradient near zero may change its sign, and lead to another adversarial.
        assert ((ours - theirs).abs() <= 1e-5).float().mean() >= share
        with torch.no_grad():
            assert F.cross_entropy(network(ours), labels) > 0.995 * their_loss


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_precision
def test_works_where_gradients_are_off(device, precision, mode):
    network, (images, labels) = convnet(device), batch(device, 4)
    with mode(), prepared(network, precision) as logits_fn:
        logits_fn(images)  # what this prepares must serve the gradients below
        adversarial = bim(logits_fn, images + 0, labels + 0, eps=0.1, step_size=0.05, steps=2)
    assert (adversarial - images).abs().max() > 0.05


@each_precision
def test_hooks_still_see_the_layers(device, precision):
    # Also on a convolution itself, whose forward pass is another one meanwhile.
    network, (images, _) = convnet(device), batch(device, 4)
    features = FeatureNetwork(network, ["conv2", "relu3"])
    surrogate = Surrogate(network, "relu3", DkNNB(1152, 10)).to(device)
    before, logits = features.features(images), surrogate(images)
    seen = []
    hook = network.conv2.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with prepared(features, precision) as logits_fn:
        logits_fn(images)
    hook.remove()
    torch.testing.assert_close(seen[0].flatten(1).float(), before["conv2"], rtol=0.02, atol=0.02)
    with prepared(surrogate, precision) as logits_fn:
        torch.testing.assert_close(logits_fn(images), logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("winograd", 1e-3)])
def test_any_network_works(device, precision, error):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=10).to(device).eval()
        images = torch.rand(2, 3, 64, 64).to(device)
    labels = torch.tensor([3, 7], device=device)
    loss, gradient = loss_and_gradient(network, images, labels)
    with prepared(network, precision) as logits_fn:
        found, back = loss_and_gradient(logits_fn, images, labels)
    assert found.item() == pytest.approx(loss.item(), rel=error)
    # Of many ReLUs, some change sides.
    assert (back - gradient).norm() < 100 * error * gradient.norm()


def test_convolutions_that_are_not_what_they_seem_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, images):
            return 2 * super().forward(images)

    patched = nn.Conv2d(1, 2, 3)
    patched.forward = own = lambda images: images
    network = nn.Sequential(
        Doubled(1, 2, 3),
        patched,
        nn.Conv2d(1, 2, 3).double(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)),
    )
    with prepared(network, "winograd"):
        assert [vars(module).get("forward") for module in network] == [None, own, None, None]
    assert patched.forward is own


@each_precision
def test_a_network_in_fast_training_is_attacked_as_any_other(device, precision):
    images, labels = batch(device)
    with prepared(convnet(device), precision) as logits_fn:
        loss, gradient = loss_and_gradient(logits_fn, images, labels)
    network = convnet(device).train()
    training = CookToomConvolution(network.conv2, constant=False)
    vars(network.conv2)["forward"] = training
    with prepared(network, precision) as logits_fn:
        found, back = loss_and_gradient(logits_fn, images, labels)
    assert torch.equal(found, loss)
    assert torch.equal(back, gradient)
    assert vars(network.conv2)["forward"] is training


def test_what_a_device_does_not_have_becomes_float32_and_is_said_once(device, capsys):
    other = "tf32" if device.type == "cpu" else "winograd"
    network, (images, labels) = convnet(device), batch(device)
    with prepared(network) as logits_fn:
        expected = loss_and_gradient(logits_fn, images, labels)[1]
    precisions._say.cache_clear()
    for said in (f"float32, not {other}", ""):
        with prepared(network, other) as logits_fn:
            assert torch.equal(loss_and_gradient(logits_fn, images, labels)[1], expected)
        err = capsys.readouterr().err
        assert said in err
        assert bool(err) == bool(said)


def test_tf32_is_for_gpus_from_ampere_on(monkeypatch):
    precisions._say.cache_clear()
    for capability, precision in (((7, 5), "float32"), ((8, 0), "tf32"), ((12, 0), "tf32")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert precisions._available("tf32", torch.device("cuda", 1)) == precision
    assert precisions._available("winograd", torch.device("cuda", 1)) == "float32"
    assert precisions._available("bfloat16", torch.device("cuda", 1)) == "bfloat16"


def test_tf32_is_on_while_an_attack_runs_and_off_when_a_victim_decides(monkeypatch):
    monkeypatch.setattr(precisions, "_available", lambda precision, device: precision)
    conv, seen, exact = torch.backends.cudnn.conv, {}, {"none": "ieee"}

    def attack(logits_fn, images, labels):
        logits_fn(images)
        seen["attack"] = network.seen
        victim.predict(images)
        seen["victim"] = network.seen
        return images

    class Spy(nn.Conv2d):
        def forward(self, images):
            network.seen = exact.get(conv.fp32_precision, conv.fp32_precision)
            return super().forward(images)

    network = nn.Sequential(Spy(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))
    images, labels = torch.rand(4, 1, 28, 28), torch.arange(4) % 3
    victim = DkNN(network, ["1"], k=1, device="cpu").fit(images, labels)
    perturb(attack, FeatureNetwork(network, ["1"]), images, labels, "tf32")
    assert seen == {"attack": "tf32", "victim": "ieee"}
    perturb(attack, FeatureNetwork(network, ["1"]), images, labels)
    assert seen == {"attack": "ieee", "victim": "ieee"}


def test_settings_name_a_precision():
    with pytest.raises(ValueError, match=r"`precision` to be one of \('float32', .*\), but got 'float16'"):
        AttackSettings("fgsm", {"eps": 0.1}, "float16").bind()
    assert AttackSettings("fgsm", {"eps": 0.1}).precision == "float32"
